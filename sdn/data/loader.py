"""Plan -> batches: reads ahead in a thread, and never gives a sample that was not checked."""

from __future__ import annotations

import itertools
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from sdn.data.manifest import load_manifest
from sdn.data.plan import Plan, RankStep, caption_index, check_world
from sdn.data.reading import DamagedSample, ShardReader, SplitArrays
from sdn.data.records import Batch, Sample

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

__all__ = ["DamagedSample", "ShardReader", "SplitArrays", "batches", "load_split"]

T = TypeVar("T")


def load_split(folder: Path | str, split: str) -> SplitArrays:
    """A whole split, decoded, in the order of the manifest: for small data and evaluation.

    Raises:
        ValueError: no data set, no such split, or an empty one.
        DamagedSample: a sample is not what was written.
    """
    manifest = load_manifest(folder)
    if manifest.samples(split) == 0:
        raise ValueError(f"the split {split!r} of {folder} is empty")
    reader = ShardReader(folder, manifest, split, cache_gib=0)
    try:
        counts = enumerate(manifest.shard_samples(split))
        samples = [reader.read(shard, row) for shard, rows in counts for row in range(rows)]
    finally:
        reader.close()
    return SplitArrays(
        keys=tuple(s.key for s in samples),
        pixels=torch.stack([s.pixels for s in samples]),
        captions=tuple(s.captions for s in samples),
        labels=tuple(s.labels for s in samples),
    )


def batches(
    folder: Path | str,
    split: str,
    *,
    plan: Plan,
    seed: int,
    start_step: int = 0,
    steps: int | None = None,
    rank: int = 0,
    world: int = 1,
    prefetch: int = 2,
    cache_gib: float = 0.5,
) -> Generator[Batch]:
    """The batches of one rank, from `start_step` on.

    Args:
        folder: the data set.
        split: one of its splits.
        plan: made from the same split's `shard_samples`.
        seed: of the choice among a sample's captions: over as many epochs as it has captions each
            is used once (see `caption_index`).
        start_step: global step of the first batch; where an interrupted run goes on.
        steps: number of batches; None goes on for ever.
        rank: in 0..world - 1.
        world: number of ranks; divides the plan's `lanes` and `global_batch`.
        prefetch: batches read ahead by a thread; 0 reads in the caller's thread. Closing the
            iterator ends the thread.
        cache_gib: memory for decoded samples in GiB; what fits is decoded once.

    Raises:
        ValueError: no data set, a plan for other data, or an impossible world, rank or step; at
            once, not at the first batch.
        DamagedSample: from the iterator, at the batch that would hold the sample.
    """
    manifest = load_manifest(folder)
    if manifest.shard_samples(split) != plan.shard_samples:
        raise ValueError(
            f"the plan is for {plan.samples} samples in {len(plan.shard_samples)} shards, but "
            f"{split!r} of {folder} has {manifest.samples(split)} in {len(manifest.shards(split))}"
        )
    check_world(world, plan.lanes, plan.global_batch)
    plan.samples_of(start_step, rank, world)  # refuses an impossible rank or step
    reader = ShardReader(folder, manifest, split, cache_gib=cache_gib)
    source = _read(reader, plan, seed, _Share(start_step, steps, rank, world))
    return _ahead(source, prefetch) if prefetch > 0 else source


@dataclass(frozen=True, slots=True)
class _Share:
    """Which batches, and whose part of them."""

    start_step: int
    steps: int | None
    rank: int
    world: int


def _read(reader: ShardReader, plan: Plan, seed: int, share: _Share) -> Generator[Batch]:
    stop = None if share.steps is None else share.start_step + share.steps
    try:
        for step in itertools.count(share.start_step):
            if step == stop:
                break
            yield _batch(reader, step, plan.samples_of(step, share.rank, share.world), seed)
    finally:
        reader.close()


def _batch(reader: ShardReader, step: int, part: RankStep, seed: int) -> Batch:
    places = part.samples if part.filler is None else (part.filler,)
    samples = [reader.read(shard, row) for shard, row in places]
    return Batch(
        keys=tuple(s.key for s in samples) if part.samples else (),
        pixels=torch.stack([s.pixels for s in samples]),
        captions=tuple(_caption(s, seed, part.epoch) for s in samples),
        labels=tuple(s.labels for s in samples),
        epoch=part.epoch,
        step=step,
        weight=part.weight,
    )


def _caption(sample: Sample, seed: int, epoch: int) -> str:
    return sample.captions[caption_index(seed, epoch, sample.key, len(sample.captions))]


class _End:
    """What the reading thread leaves last: the error that ended it, if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _ahead(source: Generator[T], count: int) -> Generator[T]:
    """The same items, up to `count` of them made ahead by a thread that ends with this iterator."""
    items: queue.Queue[T | _End] = queue.Queue(maxsize=count)
    closed = threading.Event()

    def put(item: T | _End) -> None:
        while not closed.is_set():
            try:
                items.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        end = _End(None)
        try:
            for item in source:
                put(item)
                if closed.is_set():
                    break
        except BaseException as error:  # noqa: BLE001 - the consumer raises it
            end = _End(error)
        finally:
            source.close()
            put(end)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while not isinstance(item := items.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        thread.join()

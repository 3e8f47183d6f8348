"""Plan -> batches: threads read ahead, and no sample comes out that was not checked."""

from __future__ import annotations

import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from sdn.data.dataset import open_dataset
from sdn.data.plan import Plan, RankStep, caption_index, check_world
from sdn.data.reading import DamagedSample, ShardReader, SplitArrays
from sdn.data.records import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from numpy.typing import NDArray

    from sdn.data.dataset import DataSet
    from sdn.data.files import Files

__all__ = [
    "DamagedSample",
    "ShardReader",
    "SplitArrays",
    "batches",
    "load_split",
    "split_blocks",
    "worker_of",
]

T = TypeVar("T")


def load_split(place: DataSet | Files | Path | str, split: str) -> SplitArrays:
    """A whole split, decoded, in the order of the manifest: for small data and evaluation.

    Raises:
        ValueError: no data set, no such split, or an empty one.
        DamagedSample: a sample is not what was written.
    """
    dataset = open_dataset(place)
    if dataset.samples(split) == 0:
        raise ValueError(f"the split {split!r} of {dataset.files.uri} is empty")
    reader = ShardReader(dataset, split, cache_gib=0)
    sizes = reader.shards.samples
    shards = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.arange(len(shards)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    try:
        return reader.read_batch(shards, rows)
    finally:
        reader.close()


def split_blocks(
    place: DataSet | Files | Path | str, split: str, *, size: int = 256, most: int | None = None
) -> Iterator[SplitArrays]:
    """A split in the order of the manifest, up to `size` samples at a time, for any length.

    Args:
        place: the data set.
        split: one of its splits; an empty one gives nothing.
        size: samples at a time.
        most: only the first so many samples; None for all. Samples lie in the order of a hash of
            their keys, so that these are a random draw.

    Raises:
        ValueError: no data set, or no such split.
        DamagedSample: a sample is not what was written.
    """
    dataset = open_dataset(place)
    reader = ShardReader(dataset, split, cache_gib=0)
    sizes = reader.shards.samples
    ends = np.cumsum(sizes)
    total = dataset.samples(split) if most is None else min(most, dataset.samples(split))
    try:
        for start in range(0, total, size):
            places = np.arange(start, min(start + size, total))
            shards = np.searchsorted(ends, places, side="right")
            yield reader.read_batch(shards, places - (ends - sizes)[shards])
    finally:
        reader.close()


def batches(
    place: DataSet | Files | Path | str,
    split: str,
    *,
    plan: Plan,
    seed: int,
    start_step: int = 0,
    steps: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 1,
    prefetch: int = 2,
    cache_gib: float = 0.5,
) -> Generator[Batch]:
    """The batches of one rank, from `start_step` on.

    Args:
        place: the data set.
        split: one of its splits.
        plan: made from the same split's number of samples in each shard.
        seed: of the choice among a sample's captions: over as many epochs as it has captions each
            is used once (see `caption_index`).
        start_step: global step of the first batch; where an interrupted run goes on.
        steps: number of batches; None goes on for ever.
        rank: in 0..world - 1.
        world: number of ranks; divides the plan's `lanes`, at most its `global_batch`.
        workers: threads that prepare batches; 0 prepares them in the caller's thread. They change
            nothing in the batches or their order. Closing the iterator ends the threads.
        prefetch: batches that each worker prepares ahead; 0 is one for all workers together.
        cache_gib: memory for decoded samples in GiB; what fits is decoded once.

    Raises:
        ValueError: no data set, a plan for other data, or an impossible world, rank, step or number
            of workers; at once, not at the first batch.
        DamagedSample: from the iterator, at the batch that would hold the sample.
    """
    dataset = open_dataset(place)
    sizes = dataset.shards(split).samples
    if not np.array_equal(sizes, plan.shard_samples):
        raise ValueError(
            f"the plan is for {plan.samples} samples in {len(plan.shard_samples)} shards, but "
            f"{split!r} of {dataset.files.uri} has {dataset.samples(split)} in {len(sizes)}"
        )
    check_world(world, plan.lanes, plan.global_batch)
    plan.samples_of(start_step, rank, world)  # refuses an impossible rank or step
    if min(workers, prefetch) < 0:
        raise ValueError(f"workers and prefetch must be >= 0, not {workers} and {prefetch}")
    stop = None if steps is None else start_step + steps
    parts = (
        _Part(step, plan.samples_of(step, rank, world))
        for step in itertools.takewhile(lambda step: step != stop, itertools.count(start_step))
    )
    work = _Work(ShardReader(dataset, split, cache_gib=cache_gib), seed)
    if workers == 0:
        return _in_turn(work, parts)
    return _ahead(work, parts, _Workers(workers, start_step), max(1, prefetch * workers))


def worker_of(step: int, start_step: int, workers: int) -> int:
    """Which of the `workers` threads, at least one, prepares the batch of a step."""
    return (step - start_step) % workers


@dataclass(frozen=True, slots=True)
class _Part:
    """What is to be prepared: a rank's part of a step."""

    step: int
    samples: RankStep

    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards and rows to read; the filler where there are no samples."""
        if self.samples.filler is None:
            return self.samples.shards, self.samples.rows
        shard, row = self.samples.filler
        return np.array([shard]), np.array([row])


class _Work:
    """How a batch is prepared."""

    def __init__(self, reader: ShardReader, seed: int) -> None:
        self.reader, self.seed = reader, seed

    def announce(self, part: _Part) -> None:
        self.reader.announce(*part.places())

    def batch(self, part: _Part) -> Batch:
        found = self.reader.read_batch(*part.places())
        epoch, seed = part.samples.epoch, self.seed
        captions = [
            options[caption_index(seed, epoch, key, len(options))]
            for key, options in zip(found.keys, found.captions, strict=True)
        ]
        return Batch(
            keys=found.keys if part.samples.filler is None else (),
            pixels=found.pixels,
            captions=tuple(captions),
            labels=found.labels,
            epoch=epoch,
            step=part.step,
            weight=part.samples.weight,
        )


def _in_turn(work: _Work, parts: Iterator[_Part]) -> Generator[Batch]:
    try:
        yield from map(work.batch, parts)
    finally:
        work.reader.close()


class _Workers:
    """Threads with a queue each: nothing but a batch's step decides which of them prepares it."""

    def __init__(self, count: int, start_step: int) -> None:
        self._start_step = start_step
        self._threads = [ThreadPoolExecutor(1, f"batches-{number}") for number in range(count)]

    def submit(self, task: Callable[[_Part], T], part: _Part) -> Future[T]:
        thread = self._threads[worker_of(part.step, self._start_step, len(self._threads))]
        return thread.submit(task, part)

    def close(self) -> None:
        """Wait for what is being prepared; what has not begun is dropped."""
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            thread.shutdown()


def _ahead(work: _Work, parts: Iterator[_Part], workers: _Workers, depth: int) -> Generator[Batch]:
    """The batches in order, up to `depth` of them prepared ahead.

    No worker ever waits for the consumer: it may stop whenever it likes.
    """
    if work.reader.fetches_ahead:
        parts = _looking_ahead(_announced(work, parts, workers), depth)
    tasks = (workers.submit(work.batch, part) for part in parts)
    pending: deque[Future[Batch]] = deque()
    try:
        pending.extend(itertools.islice(tasks, depth))
        while pending:
            batch = pending.popleft().result()
            pending.extend(itertools.islice(tasks, 1))
            yield batch
    finally:
        workers.close()
        work.reader.close()


def _announced(work: _Work, parts: Iterator[_Part], workers: _Workers) -> Iterator[_Part]:
    """The same parts; the place is told of each when it is asked for."""
    for part in parts:
        workers.submit(work.announce, part)
        yield part


def _looking_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items; each is given when `count` more have been asked for."""
    waiting = deque(itertools.islice(items, count))
    for item in items:
        waiting.append(item)
        yield waiting.popleft()
    yield from waiting

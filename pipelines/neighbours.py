"""The training images nearest to a drawn one, so that one sees what a model copies."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipelines.run import RunSpec, perform
from pipelines.store import StoreError
from sdn.data.reading import ShardReader
from sdn.metrics import SIDE, pixel_features

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from sdn.data.dataset import DataSet

KEPT = 10_000
"""Training images compared with, at most: 123 MB of features."""
_BLOCK = 256
"""Images decoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A training image near to a drawn one."""

    key: str
    captions: tuple[str, ...]
    pixels: Tensor
    """(3, H, W) uint8."""
    distance: float
    """Root mean square difference at 32x32 pixels, 0..255; 0 is the same picture."""


class Neighbours:
    """Training images of one data set by what they look like at 32x32 pixels.

    Only the small images stay in memory; the few that are shown are read again from their shards.
    """

    def __init__(
        self,
        data: DataSet,
        report: Callable[[int, int], None] = lambda done, total: None,
        kept: int = KEPT,
    ) -> None:
        """Of the training split.

        Args:
            data: the data set.
            report: called with how many images of how many are read.
            kept: images to compare with, evenly spread over a split that has more.

        Raises:
            ValueError: no training images, or a damaged sample among them.
        """
        self.total = data.samples("train")
        if self.total == 0:
            raise ValueError(f"the data set {data.files.uri} has no training images")
        self.attribution = data.manifest.attribution
        self._reader = ShardReader(data, "train", cache_gib=0.1)
        chosen = spread(self.total, kept)
        self._shards, self._rows = places(self._reader.shards.samples, chosen)
        # (M, 3072) float32 in [-1, 1]
        self._features = torch.empty(len(chosen), 3 * SIDE * SIDE)
        # A reader of its own, without a cache: each of these is read once.
        once = ShardReader(data, "train", cache_gib=0)
        try:
            for first in range(0, len(chosen), _BLOCK):
                part = slice(first, first + _BLOCK)
                read = once.read_batch(self._shards[part], self._rows[part])
                self._features[part] = pixel_features(read.pixels)
                report(min(first + _BLOCK, len(chosen)), len(chosen))
        finally:
            once.close()
        self._squares = self._features.square().sum(1)

    def __len__(self) -> int:
        """Training images compared with."""
        return len(self._features)

    @torch.inference_mode()
    def nearest(self, pixels: Tensor, count: int = 3) -> list[Neighbour]:
        """The training images nearest to a picture, the nearest first.

        Args:
            pixels: (3, H, W) uint8.
            count: how many, if there are as many.

        Raises:
            DamagedSample: one of them cannot be read any more.
        """
        drawn = pixel_features(pixels.unsqueeze(0))[0]  # (3072,)
        # |a - b|^2 without |b|^2, which is the same for all.
        near = self._squares - 2 * (self._features @ drawn)
        order = near.topk(min(count, len(self)), largest=False).indices
        found = []
        for at in order.tolist():
            sample = self._reader.read(int(self._shards[at]), int(self._rows[at]))
            difference = (self._features[at] - drawn).square().mean().sqrt()
            found.append(
                Neighbour(
                    key=sample.key,
                    captions=sample.captions,
                    pixels=sample.pixels,
                    distance=127.5 * float(difference),
                )
            )
        # By exact distances: those above are differences of large numbers.
        return sorted(found, key=lambda one: one.distance)


def spread(total: int, count: int) -> NDArray[np.int64]:
    """At most `count` of the numbers 0..total - 1, evenly spread, in order."""
    few = min(total, count)
    return np.arange(few, dtype=np.int64) * total // few


def places(
    sizes: NDArray[np.int64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shard and row of samples that are counted through a whole split.

    Args:
        sizes: samples of each shard.
        chosen: numbers of samples in the split.
    """
    ends = np.cumsum(sizes)
    shards = np.searchsorted(ends, chosen, side="right")
    return shards, chosen - (ends - sizes)[shards]


def data_of_model(folder: Path, store: str | None) -> DataSet:
    """The data set that a model was trained on, in the version that it was; prepares nothing.

    Args:
        folder: of the model.
        store: in place of the configured one.

    Raises:
        StoreError: the store does not have it.
        ValueError, OSError: the model does not say what it was trained on, or that is gone.
    """
    from pipelines import work
    from pipelines.preparing import data_set
    from sdn.config import DataConfig, from_dict
    from sdn.stage_run import CONFIG

    if not (folder / CONFIG).is_file():
        raise ValueError(f"the model folder has no {CONFIG} that names its data")
    saved = json.loads((folder / CONFIG).read_text())
    run = RunSpec(saved["name"], store=store).open()
    # The data alone: an older model may have settings of training that are gone.
    config = dataclasses.replace(run.config, data=from_dict(DataConfig, saved["data"]))
    run = dataclasses.replace(run, config=config)
    job = work.prepare(run)
    if run.store.done(job.stage.folder) is None:
        raise StoreError(
            f"the store {run.store.uri} has no {job.stage.folder}, the data of this model: name "
            "the store of its run with --store"
        )
    return data_set(run, perform(run, job))


def example_captions(data: DataSet, max_chars: int, count: int = 6) -> list[str]:
    """Captions to try, of images that no training saw: of the test split, else of validation.

    Raises:
        ValueError: one of the samples is damaged.
    """
    from sdn.captions import check_caption

    split = next((name for name in ("test", "validation") if data.samples(name)), None)
    if split is None:
        return []
    reader = ShardReader(data, split, cache_gib=0)
    try:
        shards, rows = places(reader.shards.samples, spread(data.samples(split), count))
        found = reader.read_batch(shards, rows)
    finally:
        reader.close()
    usable = []
    for captions in found.captions:
        try:
            usable.append(check_caption(captions[0], max_chars))
        except ValueError:
            continue
    return list(dict.fromkeys(usable))

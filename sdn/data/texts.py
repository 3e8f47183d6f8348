"""The captions of a split without its images, and random samples of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from sdn.data.reading import DamagedSample, ShardReader, SplitArrays, read_index

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.data.dataset import DataSet


def captions_of(dataset: DataSet, split: str) -> Iterator[tuple[str, ...]]:
    """The captions of each sample of a split, in the order of the manifest; no image is decoded.

    Raises:
        ValueError: no such split.
        DamagedSample: a shard or its index cannot be read.
    """
    for shard in dataset.shards(split):
        index = read_index(dataset.files, shard)
        try:
            with dataset.files.open(shard.name) as tar:
                for row in range(len(index)):
                    tar.seek(int(index.offset[row] + index.json_offset[row]))
                    about = json.loads(tar.read(int(index.json_length[row])))
                    yield tuple(about["captions"])
        except (OSError, ValueError, KeyError) as error:
            raise DamagedSample(
                shard.name, None, f"its captions cannot be read: {error}"
            ) from error


def random_samples(dataset: DataSet, split: str, count: int, seed: int = 0) -> SplitArrays | None:
    """Samples of a split drawn without replacement, decoded; None of an empty split.

    Args:
        dataset: any version.
        split: one of its splits.
        count: so many, or all where there are fewer.
        seed: of the draw.

    Raises:
        DamagedSample: a sample is not what was written.
    """
    sizes = dataset.shards(split).samples
    ends = np.cumsum(sizes)
    total = int(sizes.sum())
    if not total:
        return None
    drawn = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    places = np.sort(drawn)
    shards = np.searchsorted(ends, places, side="right")
    reader = ShardReader(dataset, split, cache_gib=0)
    try:
        return reader.read_batch(shards, places - (ends - sizes)[shards])
    finally:
        reader.close()

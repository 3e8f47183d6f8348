"""Tiny data sets for the tests of the data side."""

from __future__ import annotations

import numpy as np

from sdn.config import DataConfig
from sdn.data.dataset import open_dataset
from sdn.data.files import LocalFolder
from sdn.data.images import encode
from sdn.data.records import SPLITS, Record
from sdn.data.shards import Writing, append_dataset, write_dataset
from sdn.data.sources import Given

CONFIG = DataConfig(source="tiny", resolution=32, shard_samples=5, image_format="png")


def picture(number, size=32):
    """(H, W, 3) uint8: a pattern of its own for each number."""
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def record(number, split="train", captions=None, **changes):
    values = {
        "key": f"item-{number}",
        "image": encode(picture(number), "png"),
        "captions": captions or (f"picture {number}", f"number {number}", f"the {number}th"),
        "split": split,
        "labels": {"parity": "odd" if number % 2 else "even"},
    }
    return Record(**(values | changes))


def records(train=17, test=4):
    return [record(n, "train" if n < train else "test") for n in range(train + test)]


def given(items, size=4):
    """The items as partitions of `size`."""
    items = tuple(items)
    return [Given(items[first : first + size]) for first in range(0, len(items), size)]


def writing(config=CONFIG, **changes):
    return Writing(**({"config": config, "attribution": "nobody"} | changes))


def write(folder, items=None, config=CONFIG, **changes):
    """The manifest of a data set of these items."""
    items = records() if items is None else items
    return write_dataset(given(items), LocalFolder(folder), writing(config, **changes))


def append(folder, items, config=CONFIG, **changes):
    """The manifest of the next version, or None."""
    return append_dataset(given(items), LocalFolder(folder), writing(config, **changes))


def tables(folder):
    """Split -> samples of each shard."""
    dataset = open_dataset(folder)
    return {split: dataset.shards(split).samples.tolist() for split in SPLITS}

"""Tiny data sets for the tests of the data side."""

from __future__ import annotations

import numpy as np

from sdn.config import DataConfig
from sdn.data.images import encode
from sdn.data.records import Record
from sdn.data.shards import write_dataset

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


def write(folder, items=None, config=CONFIG, **arguments):
    items = records() if items is None else items
    return write_dataset(items, folder, config, **({"attribution": "nobody"} | arguments))

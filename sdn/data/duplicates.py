"""What a sample is recognised by when it comes twice: four digests, from strict to loose.

content   the record as it came: image file, captions, labels, split
pixels    the prepared image, pixel for pixel
near      what the prepared image looks like, coarsely
words     the words of its captions, whatever their order
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from sdn.data.records import Record

MEASURES = ("pixels", "near", "words")
"""What `DataConfig.same` may name; each but `pixels` takes two for one where pixels does, too."""
_WORD = re.compile(r"\w+")


def content_digest(record: Record) -> bytes:
    """16 bytes that any change of the record changes; its key and its place count for nothing."""
    digest = hashlib.blake2b(record.image, digest_size=16)
    about = (record.captions, sorted(record.labels.items()), record.split, record.box)
    digest.update(json.dumps(about).encode())
    return digest.digest()


def pixels_digest(pixels: NDArray[np.uint8]) -> bytes:
    """16 bytes of the prepared image, (H, W, 3) uint8."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()


def near_digest(pixels: NDArray[np.uint8]) -> bytes:
    """8 bytes of what an image looks like: its colours in 8 x 8 blocks, in steps of 32.

    Rarely equal for two things, and so strict that many a near copy escapes it: where a colour
    lies between two steps, another encoding moves it to the other one. What it finds is a part.

    Args:
        pixels: (H, W, 3) uint8; H and W at least 8.
    """
    edges = [np.linspace(0, size, _BLOCKS + 1).astype(int) for size in pixels.shape[:2]]
    sums = np.add.reduceat(pixels.astype(np.int64), edges[0][:-1], axis=0)
    sums = np.add.reduceat(sums, edges[1][:-1], axis=1)  # (8, 8, 3)
    areas = np.outer(np.diff(edges[0]), np.diff(edges[1]))[:, :, None]
    # From white on: white, the most frequent of all, lies in the middle of its step.
    steps = (255 - sums / areas + _STEP / 2) // _STEP
    return hashlib.blake2b(steps.astype(np.uint8).tobytes(), digest_size=8).digest()


_BLOCKS, _STEP = 8, 32


def words_digest(captions: Iterable[str]) -> bytes:
    """8 bytes of the words of all captions, in lower case, sorted, each once."""
    words = sorted({word for caption in captions for word in _WORD.findall(caption.lower())})
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()

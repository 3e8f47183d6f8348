"""What a sample is recognised by when it comes twice: four digests, from strict to loose.

content   the record as it came: image file, captions, labels, split
pixels    the prepared image, pixel for pixel
near      what the prepared image looks like: its difference hash
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
    """8 bytes of the image's difference hash with its mean colour.

    The image is reduced to 12 x 12 grey blocks; each says whether it is clearly darker, clearly
    brighter, or about as bright as its right neighbour. The mean colour counts in steps of 32.
    Re-encoding and rescaling mostly leave all that as it is.

    Args:
        pixels: (H, W, 3) uint8; H and W at least 12.
    """
    grey = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # (H, W)
    rows = np.array_split(np.arange(grey.shape[0]), _BLOCKS)
    columns = np.array_split(np.arange(grey.shape[1]), _BLOCKS)
    starts = [part[0] for part in rows], [part[0] for part in columns]
    sums = np.add.reduceat(np.add.reduceat(grey, starts[0], axis=0), starts[1], axis=1)
    areas = np.outer([len(part) for part in rows], [len(part) for part in columns])
    steps = np.diff(sums / areas, axis=1)
    signs = (np.sign(steps) * (np.abs(steps) > _CLEAR)).astype(np.int8)
    colour = (pixels.reshape(-1, 3).mean(axis=0) / 32).round().astype(np.int8)
    return hashlib.blake2b(signs.tobytes() + colour.tobytes(), digest_size=8).digest()


_BLOCKS = 12
_CLEAR = 4.0
"""Grey levels; less is what encoding does to an image."""


def words_digest(captions: Iterable[str]) -> bytes:
    """8 bytes of the sorted words of all captions, in lower case."""
    words = sorted(word for caption in captions for word in _WORD.findall(caption.lower()))
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()

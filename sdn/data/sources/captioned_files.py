"""What readers of files with captions share: splits by hash."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdn.config import DataConfig


def split_of_image(declared: str | None, image: bytes, config: DataConfig) -> str:
    """The split that names declare, or one drawn where they declare none.

    Args:
        declared: what the names of files, folders or fields say.
        image: the encoded file.
        config: with `validation_from_train` some of what is declared to train validates.
    """
    if declared is None:
        return split_by_hash(image, config)
    if declared == "train" and config.validation_from_train:
        return split_by_hash(image, config, test_share=0)
    return declared


def split_by_hash(image: bytes, config: DataConfig, *, test_share: float | None = None) -> str:
    """The split of an image from the hash of its file, so that equal files share one.

    Args:
        image: the encoded file.
        config: its `validation_share` and, unless it is given, `test_share`.
        test_share: 0 where the test split is settled in another way.
    """
    share = config.test_share if test_share is None else test_share
    draw = int.from_bytes(hashlib.sha256(image).digest()[:8]) / 2**64
    if draw < share:
        return "test"
    return "validation" if draw < share + config.validation_share else "train"

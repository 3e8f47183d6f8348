"""What readers of folders share: keys out of paths, captions out of text files, splits by hash."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path, PurePath

    from sdn.config import DataConfig

_UNSAFE = re.compile(r"[\s./\\\x00-\x1f\x7f\ud800-\udfff]")
"""What a key must not hold (`sdn.data.preparation`), and bytes of names that are not UTF-8."""
_KEY_BYTES = 80
"""Leaves room for a hash below the 90 bytes that preparation accepts."""


def unique_keys(paths: Iterable[PurePath]) -> dict[PurePath, str]:
    """A tar-safe key of each relative path: the path without extension, folders parted by `-`.

    Paths that would share a key get a hash of the whole path behind it. The keys depend on the set
    of paths, not on its order.
    """
    plain = {path: _plain_key(path) for path in paths}
    shared = Counter(plain.values())
    keys = {path: key for path, key in plain.items() if shared[key] == 1}
    taken = set(keys.values())
    for path in sorted(path for path, key in plain.items() if shared[key] > 1):
        keys[path] = _with_hash(plain[path], path, taken)
        taken.add(keys[path])
    return keys


def by_hash(paths: Iterable[PurePath]) -> list[PurePath]:
    """The paths in an order of their own in which any beginning is a fair draw of the whole."""
    return sorted(paths, key=lambda path: (_path_hash(path), path))


def captions_in(path: Path) -> tuple[str, ...]:
    """The captions of a text file: one a line, blank lines left out.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or holds no caption.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # editors on Windows begin with a mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} must be UTF-8, but its byte {error.start} is not; save it as UTF-8"
        ) from error
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    captions = tuple(stripped for line in text.splitlines() if (stripped := line.strip()))
    if not captions:
        raise ValueError(f"{path.name} holds no caption: expected one a line")
    return captions


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


def _plain_key(path: PurePath) -> str:
    key = _UNSAFE.sub("_", "-".join(path.with_suffix("").parts))
    # WebDataset keeps names that begin with `__` to itself.
    return _end_of(key, _KEY_BYTES).lstrip("_") or "image"


def _with_hash(key: str, path: PurePath, taken: set[str]) -> str:
    digest = _path_hash(path)
    candidates = (f"{key}-{digest[:digits]}" for digits in range(8, 65))
    return next(candidate for candidate in candidates if candidate not in taken)


def _end_of(text: str, size: int) -> str:
    """At most the last `size` bytes: the end of a long path tells more than its beginning."""
    return text.encode()[-size:].decode(errors="ignore")  # a character cut in two is left out


def _path_hash(path: PurePath) -> str:
    return hashlib.sha256(path.as_posix().encode(errors="surrogateescape")).hexdigest()

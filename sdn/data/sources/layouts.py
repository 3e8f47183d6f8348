"""What readers of published layouts check alike: paths, names of splits, texts with captions."""

from __future__ import annotations

import itertools
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from sdn.data.sources.folder_metadata import SPLIT_NAMES

if TYPE_CHECKING:
    from sdn.config import DataConfig
    from sdn.data.files import Files

# `partial-train` is what Hugging Face calls a data set that it converted only in part.
_SPLIT = re.compile(rf"(?:partial-)?({'|'.join(SPLIT_NAMES)})(?![a-z])")
_NAME_BYTES = 255


def place(config: DataConfig, files: Files | None, needed: str) -> Files:
    """The files of a source that needs a path.

    Args:
        config: names the source.
        files: where its path lies.
        needed: what must lie there, for the error.

    Raises:
        ValueError: there is no path.
    """
    if files is None:
        raise ValueError(
            f"data.path is not set: the source {config.source!r} needs {needed} "
            "(--set data.path=FOLDER)"
        )
    return files


def found_in(files: Files) -> str:
    """A few of the files that lie there, for an error that says what was found."""
    names = [about.name for about in itertools.islice(files.walk(), 4)]
    return f"found {', '.join(names[:3])}{', ...' * (len(names) > 3)}" if names else "found no file"


def content(files: Files, name: str) -> bytes:
    """The whole file, where its absence is a fault of one image only.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return files.read(name)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error


def split_in_name(name: str) -> str | None:
    """The split that a file's name or the nearest folder's begins with; None where none does."""
    parts = PurePosixPath(name.lower()).parts
    matches = (_SPLIT.match(part) for part in reversed(parts))
    return next((SPLIT_NAMES[match[1]] for match in matches if match), None)


def path_inside(name: str) -> str:
    """The plain form of a relative path.

    Raises:
        ValueError: it is absolute, leads upwards, or cannot be the name of a file.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"expected the path of a file inside the data's folder, not {name!r}")
    if len(name.encode(errors="surrogatepass")) > 4 * _NAME_BYTES or any(
        len(part.encode(errors="surrogatepass")) > _NAME_BYTES for part in parts
    ):
        raise ValueError(f"a path longer than file systems take: {name[:40]!r}...")
    return "/".join(parts)


def caption_lines(data: bytes, name: str) -> tuple[str, ...]:
    """The captions of a text: one a line, blank lines left out.

    Raises:
        ValueError: it is not UTF-8, or holds no caption.
    """
    try:
        text = data.decode("utf-8-sig")  # editors on Windows begin with a mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} must be UTF-8, but its byte {error.start} is not; save it as UTF-8"
        ) from error
    captions = tuple(stripped for line in text.splitlines() if (stripped := line.strip()))
    if not captions:
        raise ValueError(f"{name} holds no caption: expected one a line")
    return captions


def caption_values(value: object, name: str) -> tuple[str, ...]:
    """The captions in a field or column: a text or a list of texts, blank ones left out.

    Raises:
        ValueError: it is something else, or holds no caption.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(
        text is None or isinstance(text, str) for text in texts
    ):
        raise ValueError(f"{name} must be a text or a list of texts, not {str(value)[:80]!r}")
    captions = tuple(text for text in texts if text and text.strip())
    if not captions:
        raise ValueError(f"{name} holds no caption")
    return captions

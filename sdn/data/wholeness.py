"""Whether a file ends where its format says it does: an upload that stands still does not."""

from __future__ import annotations

import gzip
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdn.data.files import FileInfo, Files

_HEAD, _TAIL, _PIECE = 16, 4096, 1 << 20
_ENDINGS = (".tar.gz", ".tgz")


def cut_off(files: Files, info: FileInfo) -> str | None:
    """Why a file looks as if the rest of it were still to come; None where it does not.

    Formats without a mark of their end pass, and so does a file that is of no known format: what is
    wrong with it is found when it is read.

    Args:
        files: where it lies.
        info: the file.
    """
    head = files.read_range(info.name, 0, _HEAD)
    tail = files.read_range(info.name, max(0, info.size - _TAIL), _TAIL)
    for magic, expected, is_whole in _FORMATS:
        if head.startswith(magic):
            return None if is_whole(head, tail, info.size) else f"looks cut off: {expected}"
    name = info.name.lower()
    if name.endswith(".tar") and (info.size % 512 or any(tail[-512:])):
        return "looks cut off: a tar ends with an empty block"
    if name.endswith(_ENDINGS) and not _unpacks(files, info.name):
        return "looks cut off: it cannot be unpacked to its end"
    return None


def _unpacks(files: Files, name: str) -> bool:
    """Whether a gzip file ends where it should; damage elsewhere is for its reader to tell."""
    try:
        with files.open(name) as packed, gzip.GzipFile(fileobj=packed) as file:
            while file.read(_PIECE):
                pass
    except EOFError:
        return False
    except (OSError, zlib.error):
        return True
    return True


_FORMATS: tuple[tuple[bytes, str, Callable[[bytes, bytes, int], bool]], ...] = (
    # Cameras write more behind an image's end; so the mark is looked for, not expected last.
    (b"\xff\xd8\xff", "a JPEG has an end mark", lambda head, tail, size: b"\xff\xd9" in tail),
    (b"\x89PNG", "a PNG has a chunk IEND", lambda head, tail, size: b"IEND" in tail),
    (
        b"RIFF",
        "its header says that it is longer",
        lambda head, tail, size: size >= 8 + int.from_bytes(head[4:8], "little"),
    ),
    (b"GIF8", "a GIF has an end mark", lambda head, tail, size: b";" in tail[-16:]),
    (
        b"BM",
        "its header says that it is longer",
        lambda head, tail, size: size >= int.from_bytes(head[2:6], "little"),
    ),
    (b"PAR1", "a parquet file ends with PAR1", lambda head, tail, size: tail.endswith(b"PAR1")),
)

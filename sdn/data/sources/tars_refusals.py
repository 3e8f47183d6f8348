"""Which members of a tar of unknown origin are refused."""

from __future__ import annotations

import re
import tarfile

LARGEST = 256 << 20
"""Bytes of the largest member that is accepted."""

_BAD_NAME = re.compile(r"[\x00-\x1f\x7f]")
_DRIVE = re.compile(r"[A-Za-z]:")
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a fifo",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def refusal(name: str, size: int, header: tarfile.TarInfo, *, is_sparse: bool) -> str | None:
    """Why a member must not be used; None for a plain file or folder.

    Args:
        name: as the extended headers have it.
        size: bytes, likewise.
        header: of the member.
        is_sparse: whether the extended headers say so.
    """
    if size > LARGEST:
        return f"of {size} bytes; at most {LARGEST} are accepted"
    return _of_type(header, is_sparse=is_sparse) or _of_name(name)


def _of_type(header: tarfile.TarInfo, *, is_sparse: bool) -> str | None:
    kind = "a sparse file" if is_sparse else _KINDS.get(header.type)
    if kind is None and not (header.isreg() or header.isdir()):
        kind = f"of the unknown type {header.type!r}"
    if kind is None:
        return None
    target = f" to {header.linkname[:80]!r}" if header.islnk() or header.issym() else ""
    return f"{kind}{target}: expected a plain file"


def _of_name(name: str) -> str | None:
    if not name or _BAD_NAME.search(name):
        return "its name is empty or has control characters"
    if name[0] in "/\\" or _DRIVE.match(name) or ".." in re.split(r"[/\\]", name):
        return "its name leads out of the archive's folder"
    return None

"""The members of a tar of unknown origin, one after the other, nothing of it written to disk.

Python's `tarfile` takes a broken header or a cut between two members for the end, keeps every
member it has seen, and reads extended headers of any size; so only its parsing of a single header
is used here. Sizes that a header claims are never allocated before the bytes are there.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from sdn.data.sources.tars_refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 20
_LARGEST_HEADER = 1 << 20
"""Bytes of the largest extended header: a name and some times."""
_PADDING = 16 << 20
"""As far as the end is checked; tar pads to 10 KiB, or what its blocking factor says."""


class DamagedTarError(ValueError):
    """The archive cannot be read beyond a place; the text names the byte."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"at byte {offset}: {reason}")


@dataclass(frozen=True, slots=True)
class Member:
    """A file in the archive, before its content is read."""

    name: str
    size: int
    refused: str | None
    """Why it must not be used; None for a plain file."""


class Members:
    """The members of one archive, plain or compressed by gzip, in their order."""

    def __init__(self, file: BinaryIO) -> None:
        """Of a file that can seek; it is left open."""
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._file = gzip.GzipFile(fileobj=file) if packed else file
        self._offset = 0  # in the unpacked archive
        self._left = 0  # bytes of the current member that are not read yet, padding included
        self._extended: dict[str, str] = {}

    def __iter__(self) -> Iterator[Member]:
        """All members but folders; ends only behind a proper end of the archive.

        Raises:
            DamagedTarError: the archive is cut off or damaged, or no archive.
            OSError: the file cannot be reached.
        """
        while (header := self._header()) is not None:
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                self._extended |= self._records(header)
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                self._extended["path"] = _text(self._extension(header).partition(b"\0")[0])
            elif header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                self._begin(header.size)
            else:
                member = self._member(header)
                if header.type != tarfile.DIRTYPE or member.refused:
                    yield member

    def content(self, member: Member) -> bytes:
        """The bytes of the member that came last.

        Raises:
            DamagedTarError, OSError: as above.
        """
        data = self._take(member.size)
        self._left -= member.size
        return data

    def _header(self) -> tarfile.TarInfo | None:
        """The next header; None at the end."""
        self._skip()
        start = self._offset
        block = self._read(_BLOCK)
        if len(block) < _BLOCK:
            raise DamagedTarError(start, "the archive ends without its end mark: it was cut off")
        if not any(block):
            self._check_end(start)
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DamagedTarError(start, f"no header of a tar's member ({error})") from error

    def _member(self, header: tarfile.TarInfo) -> Member:
        extended, self._extended = self._extended, {}
        name, size = extended.get("path", header.name), header.size
        if "size" in extended:
            if not re.fullmatch(r"[0-9]{1,19}", extended["size"]):
                raise DamagedTarError(self._offset, f"a member's size is {extended['size'][:40]!r}")
            size = int(extended["size"])
        has_content = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        self._begin(size if has_content else 0)
        is_sparse = any(field.startswith("GNU.sparse.") for field in extended)
        return Member(name, size, refusal(name, size, header, is_sparse=is_sparse))

    def _begin(self, size: int) -> None:
        if size < 0:
            raise DamagedTarError(self._offset, f"a member's size is {size}")
        self._left = -(-size // _BLOCK) * _BLOCK

    def _extension(self, header: tarfile.TarInfo) -> bytes:
        if not 0 <= header.size <= _LARGEST_HEADER:
            raise DamagedTarError(self._offset, f"an extended header of {header.size} bytes")
        self._begin(header.size)
        data = self._take(header.size)
        self._left -= header.size
        return data

    def _records(self, header: tarfile.TarInfo) -> dict[str, str]:
        """What a pax header says: lines such as `19 path=folder/name`, the length first."""
        data, records, offset = self._extension(header), {}, self._offset
        while data.strip(b"\0"):
            length, _, rest = data[:20].partition(b" ")
            end = int(length) if length.isdigit() else 0
            name, is_record, value = data[len(length) + 1 : end].partition(b"=")
            if not rest or not is_record or not value.endswith(b"\n") or end > len(data):
                raise DamagedTarError(offset, "a damaged extended header")
            records[_text(name)] = _text(value[:-1])
            data = data[end:]
        return records

    def _check_end(self, start: int) -> None:
        """Refuse anything behind the end mark: a damaged header can look like one."""
        while self._offset < start + _PADDING and (padding := self._read(_PIECE)):
            if any(padding):
                raise DamagedTarError(
                    start,
                    "an end mark, but more data behind it; of joined archives, give each by itself",
                )

    def _skip(self) -> None:
        while self._left:
            self._left -= len(self._take(min(self._left, _PIECE)))

    def _take(self, size: int) -> bytes:
        start, data = self._offset, self._read(size)
        if len(data) < size:
            raise DamagedTarError(
                start + len(data),
                f"the archive ends inside a member, {size - len(data)} bytes miss",
            )
        return data

    def _read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end of the file."""
        data = bytearray()
        try:
            while piece := self._file.read(min(size - len(data), _PIECE)):
                data += piece
                self._offset += len(piece)
        # What gzip raises for a damaged or cut off file.
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DamagedTarError(
                self._offset, f"{error} (bytes of the unpacked archive)"
            ) from error
        return bytes(data)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")

"""A landing place as a source sees it: nothing but what may be taken, and only to be read."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, BinaryIO, NoReturn, cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from sdn.data.files import FileInfo, Files

_IN_MEMORY = 16 << 20


class LandedFiles:
    """`Files` that lists some of another's files; whatever is asked for by name is there."""

    def __init__(
        self,
        files: Files,
        shown: Sequence[FileInfo] = (),
        lines: Mapping[str, frozenset[int]] | None = None,
    ) -> None:
        """Args:
        files: the place itself.
        shown: what is listed.
        lines: file -> numbers of its lines, from 1, that are read; all others are empty ones.
        """
        self._files, self._shown, self._lines = files, shown, lines or {}
        self.uri = files.uri

    def __reduce__(self) -> tuple[type[LandedFiles], tuple[Files]]:
        """Without the list: who works on a part of a source asks by name."""
        return type(self), (self._files,)

    def walk(self, below: str = "") -> Iterator[FileInfo]:
        """As in `Files`."""
        return (info for info in self._shown if not below or info.name.startswith(f"{below}/"))

    def holds_files(self) -> bool:
        """As in `Files`."""
        return next(self.walk(), None) is not None

    def exists(self, name: str) -> bool:
        """As in `Files`."""
        return self._files.exists(name)

    def size(self, name: str) -> int:
        """As in `Files`."""
        return self._files.size(name)

    def sha256(self, name: str) -> str:
        """As in `Files`."""
        return self._files.sha256(name)

    def read(self, name: str) -> bytes:
        """As in `Files`."""
        return self._files.read(name)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """As in `Files`."""
        return self._files.read_range(name, offset, length)

    def open(self, name: str) -> BinaryIO:
        """As in `Files`; lines that are passed over are empty, so that others keep their number."""
        wanted = self._lines.get(name)
        if wanted is None:
            return self._files.open(name)
        kept = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 (the caller closes it)
        with self._files.open(name) as lines:
            for number, line in enumerate(lines, start=1):
                kept.write(line if number in wanted else b"\n")
        kept.seek(0)
        return cast("BinaryIO", kept)

    def prepare(self) -> None:
        """As in `Files`: refused."""
        self._refuse()

    def write(self, name: str, data: bytes) -> None:  # noqa: ARG002 (nothing is written)
        """As in `Files`: refused."""
        self._refuse()

    def writing(self, name: str) -> AbstractContextManager[BinaryIO]:  # noqa: ARG002
        """As in `Files`: refused."""
        self._refuse()

    def remove(self, name: str) -> None:  # noqa: ARG002
        """As in `Files`: refused."""
        self._refuse()

    def close(self) -> None:
        """As in `Files`."""
        self._files.close()

    def _refuse(self) -> NoReturn:
        raise ValueError(f"{self.uri} is a landing place: it is read, and never written to")

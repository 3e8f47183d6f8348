"""The seam between data sets and where they lie: every byte read or written passes through here."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from io import BufferedReader

_OPEN_FILES = 128


class LocalFolder:
    """The files of one data set in one folder, by name. Not for use by several threads at once."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def names(self) -> list[str]:
        """Names of the files in the folder, sorted; none where there is no folder."""
        if not self.path.is_dir():
            return []
        return sorted(entry.name for entry in self.path.iterdir() if entry.is_file())

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        """Length of the file in bytes."""
        return (self.path / name).stat().st_size

    def sha256(self, name: str) -> str:
        """SHA-256 of the file as hexadecimal digits; read in pieces."""
        with self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, name: str) -> bytes:
        """The whole file."""
        return (self.path / name).read_bytes()

    def open(self, name: str) -> BufferedReader:
        """The file for reading in sequence."""
        return (self.path / name).open("rb")

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer where the file ends before."""
        descriptor = self._descriptor(name)
        pieces = []
        while length > 0:
            piece = os.pread(descriptor, length, offset)
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def prepare(self) -> None:
        """Make the folder and try to write into it.

        Raises:
            ValueError: it cannot be made or written to.
        """
        probe = self.path / f".probe-{os.getpid()}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ValueError(f"cannot write to {self.path}: {error.strerror or error}") from error

    def write(self, name: str, data: bytes) -> None:
        """The whole file, atomically: a reader sees the old one or the new one, never a part."""
        temporary = self.path / f".{name}-{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / name)
        finally:
            temporary.unlink(missing_ok=True)
        # The new name itself survives a power cut only once the folder is on disk.
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, name: str) -> None:
        """Delete the file, if there is one."""
        (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files kept open for `read_range`."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, name: str) -> int:
        if name in self._descriptors:
            self._descriptors.move_to_end(name)
            return self._descriptors[name]
        if len(self._descriptors) >= _OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        descriptor = os.open(self.path / name, os.O_RDONLY)
        self._descriptors[name] = descriptor
        return descriptor

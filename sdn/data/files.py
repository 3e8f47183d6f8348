"""The seam between data and where it lies: every byte read or written passes through here.

`LocalFolder` is the folder of a disk; `pipelines.s3_files` has its like for `s3://bucket/prefix`.
Both can be pickled, so that a partition of a source carries along where to read.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

_OPEN_FILES = 128


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file as a listing shows it."""

    name: str
    """Relative to the place, parts joined by `/`."""
    size: int
    """Bytes."""
    stamp: str
    """Changes when the content does: time of change, or the server's tag."""


class Files(Protocol):
    """What the data side needs of a place. Names are relative, with `/`.

    A file or place that cannot be reached raises OSError; its text says what to do.
    """

    uri: str
    """The place in the words of a user: a path, or `s3://bucket/prefix`."""

    def walk(self, below: str = "") -> Iterator[FileInfo]:
        """All files below the folder of this name, at any depth, hidden ones and ours in the
        making left out; in no order to rely on, and without holding the whole listing.
        """

    def holds_files(self) -> bool:
        """Whether anything lies there; a server that is away is not waited for long."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def size(self, name: str) -> int:
        """Length of the file in bytes."""

    def sha256(self, name: str) -> str:
        """SHA-256 of the file as hexadecimal digits; read in pieces."""

    def read(self, name: str) -> bytes:
        """The whole file."""

    def open(self, name: str) -> BinaryIO:
        """The file for reading; it can seek."""

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer where the file ends before."""

    def prepare(self) -> None:
        """Make the place and try to write into it.

        Raises:
            ValueError: it cannot be made or written to.
        """

    def write(self, name: str, data: bytes) -> None:
        """The whole file, atomically: a reader sees the old one or the new one, never a part."""

    def writing(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to be filled piece by piece; it appears, whole, when the context ends well."""

    def remove(self, name: str) -> None:
        """Delete the file, if there is one."""

    def close(self) -> None:
        """Give back what is kept open between calls."""


class LocalFolder:
    """The files of one folder. Several threads may use it at once."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.uri = str(path)
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[LocalFolder], tuple[Path]]:
        """Without the open files."""
        return type(self), (self.path,)

    def walk(self, below: str = "") -> Iterator[FileInfo]:
        """As in `Files`; links are followed, but in no circle."""
        seen: set[str] = set()
        for folder, folders, names in os.walk(self.path / below, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if not name.startswith(".") and path.is_file():
                    about = path.stat()
                    relative = path.relative_to(self.path).as_posix()
                    yield FileInfo(relative, about.st_size, str(about.st_mtime_ns))

    def holds_files(self) -> bool:
        """As in `Files`."""
        return next(self.walk(), None) is not None

    def exists(self, name: str) -> bool:
        """As in `Files`."""
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        """As in `Files`."""
        return (self.path / name).stat().st_size

    def sha256(self, name: str) -> str:
        """As in `Files`."""
        with (self.path / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, name: str) -> bytes:
        """As in `Files`."""
        return (self.path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """As in `Files`."""
        return (self.path / name).open("rb")

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """As in `Files`; by positioned reads: a mapped file that is cut short kills the process."""
        # Under the lock: another thread may close the descriptor to make room for its own.
        with self._lock:
            descriptor = self._descriptor(name)
            data = os.pread(descriptor, length, offset)
            while len(data) < length:  # the end of the file, or a read that was interrupted
                more = os.pread(descriptor, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        return data

    def prepare(self) -> None:
        """As in `Files`."""
        probe = self.path / f".probe-{os.getpid()}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ValueError(f"cannot write to {self.path}: {error.strerror or error}") from error

    def write(self, name: str, data: bytes) -> None:
        """As in `Files`."""
        with self.writing(name) as file:
            file.write(data)

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """As in `Files`: under a temporary name, which gets the final one once it is on disk."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with temporary.open("wb") as file:
                yield cast("BinaryIO", file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            self._forget(name)
        finally:
            temporary.unlink(missing_ok=True)
        # The new name itself survives a power cut only once the folder is on disk.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, name: str) -> None:
        """As in `Files`; a folder inside that becomes empty goes, too."""
        path = self.path / name
        path.unlink(missing_ok=True)
        self._forget(name)
        for folder in path.parents:
            if folder == self.path or not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()

    def close(self) -> None:
        """As in `Files`."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _forget(self, name: str) -> None:
        """Close the file that had this name until now."""
        with self._lock:
            if name in self._descriptors:
                os.close(self._descriptors.pop(name))

    def _descriptor(self, name: str) -> int:
        if name in self._descriptors:
            self._descriptors.move_to_end(name)
            return self._descriptors[name]
        if len(self._descriptors) >= _OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        descriptor = os.open(self.path / name, os.O_RDONLY)
        self._descriptors[name] = descriptor
        return descriptor

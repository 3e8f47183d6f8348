"""A place for folders of results: a local folder or an S3 prefix.

A folder is published whole: its files first, the mark `done.json` last, and only a folder with
that mark is ever read. So what a killed run leaves behind is never taken for a result.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sdn.data.files import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from filelock import BaseFileLock

    from sdn.data.files import Files

DONE = "done.json"


class StoreError(RuntimeError):
    """The store cannot be used as asked; the text says what to do."""


class Store(Protocol):
    """What stages need of a store. Names are relative, with `/`."""

    uri: str

    def check(self) -> None:
        """Raise StoreError where nothing can be written, before any work is done."""

    def done(self, name: str) -> dict[str, Any] | None:
        """What `publish` was given for this folder, or None where it is not finished."""

    def workspace(self, name: str) -> Path:
        """A local folder in which to build `name`; kept if the work is interrupted."""

    def lock(self, name: str) -> AbstractContextManager[object]:
        """Held while `name` is built: a second run on this machine waits and finds it done."""

    def publish(self, name: str, result: dict[str, Any]) -> None:
        """Make the workspace of `name` a finished folder with this result."""

    def fetch(self, name: str) -> Path:
        """A local folder with the files of a finished folder."""

    def files(self, name: str) -> Files:
        """The folder where it lies, read and written file by file."""


def open_files(uri: str, cache: Path, endpoint: str | None = None, cache_gib: float = 8.0) -> Files:
    """The files at a local folder or `s3://bucket/prefix`; the latter with a cache on this machine.

    Raises:
        StoreError: another scheme.
    """
    if uri.startswith("s3://"):
        from pipelines.s3_files import S3Files

        return S3Files(uri, endpoint=endpoint, cache=cache.expanduser(), cache_gib=cache_gib)
    if "://" in uri:
        raise StoreError(f"{uri}: expected a folder or s3://bucket/prefix")
    return LocalFolder(Path(uri).expanduser())


def open_store(uri: str, cache: Path, endpoint: str | None = None) -> Store:
    """The store at a local folder or `s3://bucket/prefix`.

    Raises:
        StoreError: another scheme.
    """
    if uri.startswith("s3://"):
        from pipelines.s3 import S3Store

        return S3Store(uri, cache, endpoint)
    if "://" in uri:
        scheme = uri.split("://", 1)[0]
        raise StoreError(
            f"store {uri}: {scheme}:// is not known; use a folder or s3://bucket/prefix"
        )
    return LocalStore(Path(uri))


class LocalStore:
    """A folder on this machine. Results are used where they lie."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.uri = str(self.root)

    def check(self) -> None:
        """As in `Store`."""
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise StoreError(
                f"store {self.root} cannot be written ({error.strerror or error}): make the folder "
                "writable or name another one with --store"
            ) from error

    def done(self, name: str) -> dict[str, Any] | None:
        """As in `Store`."""
        return read_mark(self.root / name)

    def workspace(self, name: str) -> Path:
        """As in `Store`: the final place, unfinished until its mark is there."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def lock(self, name: str) -> AbstractContextManager[object]:
        """As in `Store`; the system lets go of it if this process dies."""
        return folder_lock(self.root, name)

    def publish(self, name: str, result: dict[str, Any]) -> None:
        """As in `Store`."""
        write_mark(self.root / name, result)

    def fetch(self, name: str) -> Path:
        """As in `Store`."""
        if self.done(name) is None:
            raise StoreError(f"{self.root / name} is not finished: run the stage that makes it")
        return self.root / name

    def files(self, name: str) -> Files:
        """As in `Store`."""
        return LocalFolder(self.root / name)


def folder_lock(root: Path, name: str) -> BaseFileLock:
    """A lock on this machine for the folder `name` below `root`."""
    from filelock import FileLock

    path = root / "locks" / f"{name.replace('/', '-')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def read_mark(folder: Path) -> dict[str, Any] | None:
    """The result of a finished folder; None where there is no mark or only a part of one."""
    try:
        mark = json.loads((folder / DONE).read_text())
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) else None


def write_mark(folder: Path, result: dict[str, Any]) -> None:
    """Write the mark atomically, after everything beside it has reached the disk."""
    for path in files_below(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    temporary = folder / f".{DONE}.tmp"
    # Keys stay in their order: that of an evaluation's models is that of the stages.
    temporary.write_text(json.dumps(result, indent=2))
    temporary.replace(folder / DONE)


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and its subfolders, in order of their names."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def clear(folder: Path) -> None:
    """Empty a workspace whose half-done content cannot be gone on with."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

"""Blocks of remote files on this machine's disk, shared by all its processes, limited in size."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

BLOCK = 4 << 20
"""Bytes of a block; the last one of a file is shorter."""
_OPEN_FILES = 128
_FETCHERS = 4
_TOUCH_S = 60.0
_LOOK_EVERY = 0.05
"""Share of the limit that one process writes between two looks at the whole."""


class BlockCache:
    """Ranges of files that never change, in blocks. For several threads and processes at once.

    A block is written under a temporary name and then renamed, so nobody ever sees half of one.
    Which version of a file it came from is not asked: data sets check each sample by its checksum,
    and `forget` a file that fails.
    """

    def __init__(
        self,
        folder: Path,
        scope: str,
        limit_gib: float,
        fetch: Callable[[str, int, int], bytes],
    ) -> None:
        """Nothing is made yet.

        Args:
            folder: of the blocks of all files.
            scope: tells this place's files from others of the same name.
            limit_gib: what all blocks together may take, in GiB.
            fetch: (name, offset, length) -> bytes from the server, fewer behind the end.
        """
        self._folder, self._scope, self._fetch = folder, scope, fetch
        self._limit = int(limit_gib * 2**30)
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[tuple[str, int], tuple[int, float]] = OrderedDict()
        self._coming: dict[tuple[str, int], Future[bytes]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._written = 0
        self._usable = True

    def read(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer where the file ends before."""
        if length <= 0:
            return b""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if first == last:
            return self._piece(name, first, offset - first * BLOCK, length)
        pieces = []
        for number in range(first, last + 1):
            start = max(0, offset - number * BLOCK)
            end = min(BLOCK, offset + length - number * BLOCK)
            pieces.append(self._piece(name, number, start, end - start))
        return b"".join(pieces)

    def prefetch(self, name: str, offset: int, length: int) -> None:
        """Begin to fetch the blocks of a range, without waiting for them."""
        for number in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1):
            # Asked for each sample: what is open already must cost next to nothing.
            if (name, number) in self._descriptors or (name, number) in self._coming:
                continue
            if self._usable and self._open(name, number) is None:
                self._begin(name, number)

    def forget(self, name: str) -> None:
        """Delete the blocks of a file."""
        with self._lock:
            for key in [key for key in self._descriptors if key[0] == name]:
                os.close(self._descriptors.pop(key)[0])
        folder = self._of(name)
        for path in folder.iterdir() if folder.is_dir() else ():
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close what is open and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        with self._lock:
            self._coming.clear()
            while self._descriptors:
                os.close(self._descriptors.popitem()[1][0])

    def _piece(self, name: str, number: int, start: int, length: int) -> bytes:
        # Under the lock: another thread may close the descriptor to make room.
        with self._lock:
            found = self._descriptors.get((name, number))
            if found is not None and time.monotonic() - found[1] < _TOUCH_S:
                self._descriptors.move_to_end((name, number))
                return os.pread(found[0], length, start)
        descriptor = self._open(name, number)
        if descriptor is not None:
            with self._lock:
                found = self._descriptors.get((name, number))
                if found is not None:
                    return os.pread(found[0], length, start)
        return self._begin(name, number).result()[start : start + length]

    def _open(self, name: str, number: int) -> int | None:
        """A descriptor of a block that is there; marks it as used now."""
        path = self._of(name) / str(number)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            os.utime(path)
        except OSError:
            return None
        with self._lock:
            before = self._descriptors.pop((name, number), None)
            if before is not None:
                os.close(before[0])
            elif len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1][0])
            self._descriptors[name, number] = descriptor, time.monotonic()
        return descriptor

    def _begin(self, name: str, number: int) -> Future[bytes]:
        """The block on its way; asked for once, however many wait for it."""
        with self._lock:
            if (name, number) not in self._coming:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="s3")
                self._coming[name, number] = self._pool.submit(self._bring, name, number)
            return self._coming[name, number]

    def _bring(self, name: str, number: int) -> bytes:
        try:
            data = self._fetch(name, number * BLOCK, BLOCK)
            if self._usable:
                self._keep(name, number, data)
            return data
        finally:
            with self._lock:
                self._coming.pop((name, number), None)

    def _keep(self, name: str, number: int, data: bytes) -> None:
        folder = self._of(name)
        temporary = folder / f".{number}-{os.getpid()}-{threading.get_ident()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(folder / str(number))
        except OSError as error:
            self._usable = False
            logger.warning(
                "the cache %s cannot be written (%s): reading goes on without it; make room or set "
                "SDN_CACHE to another place",
                self._folder,
                error.strerror or error,
            )
            with suppress(OSError):
                temporary.unlink()
            return
        self._written += len(data)
        if self._written > self._limit * _LOOK_EVERY:
            self._written = 0
            self._make_room()

    def _make_room(self) -> None:
        """Delete the blocks used longest ago while all take more than the limit; one at a time."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self._folder / "eviction.lock", timeout=0):
                blocks = []
                for path in self._folder.glob("*/*"):
                    try:
                        about = path.stat()
                    except FileNotFoundError:
                        continue
                    blocks.append((about.st_mtime, about.st_size, path))
                total = sum(size for _, size, _ in blocks)
                for _, size, path in sorted(blocks) if total > self._limit else ():
                    path.unlink(missing_ok=True)
                    total -= size
                    if total <= 0.9 * self._limit:
                        break
        except Timeout:
            return  # another process is at it

    def _of(self, name: str) -> Path:
        digest = hashlib.sha256(f"{self._scope} {name}".encode()).hexdigest()[:32]
        return self._folder / digest

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
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

BLOCK = 4 << 20
"""Bytes of a block; the last one of a file is shorter."""
_OPEN_FILES = 128
_FETCHERS = 4
_TOUCH_S = 60.0
_KNOWN_NAMES = 4096
_LEFT_S = 3600.0
"""A block that has been in the making for so long was left by a process that died."""
_LOOK_EVERY = 0.01
"""Share of the limit that one process writes between two looks at the whole."""


_Key: TypeAlias = tuple[str, int]
"""Name of a file, number of a block."""


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
        self._descriptors: OrderedDict[_Key, tuple[int, float]] = OrderedDict()
        self._folders: dict[str, Path] = {}
        self._coming: dict[_Key, Future[bytes]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._written = 0
        self._usable = True

    def read(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer where the file ends before."""
        if length <= 0:
            return b""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if first == last:
            return self._piece((name, first), offset - first * BLOCK, length)
        pieces = []
        for number in range(first, last + 1):
            start = max(0, offset - number * BLOCK)
            end = min(BLOCK, offset + length - number * BLOCK)
            pieces.append(self._piece((name, number), start, end - start))
        return b"".join(pieces)

    def prefetch(self, name: str, offset: int, length: int) -> None:
        """Begin to fetch the blocks of a range, without waiting for them."""
        if not self._usable or length <= 0:
            return
        for number in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1):
            key = name, number
            # Asked for each sample: what is open already must cost next to nothing.
            if key in self._descriptors or key in self._coming:
                continue
            with self._lock:
                if self._opened(key) is not None or self._asked(key):
                    continue
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="s3")
                self._pool.submit(self._bring, key, self._promise(key))

    def forget(self, name: str) -> None:
        """Delete the blocks of a file; those on their way are not kept."""
        with self._lock:
            for key in [key for key in self._descriptors if key[0] == name]:
                os.close(self._descriptors.pop(key)[0])
            for key in [key for key in self._coming if key[0] == name]:
                del self._coming[key]
        folder = self._of(name)
        for path in folder.iterdir() if folder.is_dir() else ():
            if not _in_the_making(path):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close what is open and end the threads."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._process == os.getpid():
            pool.shutdown(cancel_futures=True)
        with self._lock:
            self._coming.clear()
            while self._descriptors:
                os.close(self._descriptors.popitem()[1][0])

    def _piece(self, key: _Key, start: int, length: int) -> bytes:
        # Under the lock: another thread may close the descriptor to make room.
        with self._lock:
            found = self._descriptors.get(key)
            if found is not None and time.monotonic() - found[1] < _TOUCH_S:
                self._descriptors.move_to_end(key)
                return os.pread(found[0], length, start)
            descriptor = self._opened(key)
            if descriptor is not None:
                return os.pread(descriptor, length, start)
            if self._usable:
                coming = self._promise(key)
        if not self._usable:  # nothing would keep a whole block
            return self._fetch(key[0], key[1] * BLOCK + start, length)
        # In this thread: readers do not queue for the few threads that fetch ahead.
        self._bring(key, coming)
        return coming.result()[start : start + length]

    def _opened(self, key: _Key) -> int | None:
        """A new descriptor of a block that is there. Under the lock."""
        # The one until now may be of a deleted block, whose room is free once all have closed it.
        before = self._descriptors.pop(key, None)
        if before is not None:
            os.close(before[0])
        descriptor = _open_block(f"{self._of(key[0])}/{key[1]}")
        if descriptor is not None:
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1][0])
            self._descriptors[key] = descriptor, time.monotonic()
        return descriptor

    def _asked(self, key: _Key) -> bool:
        """Whether a block is on its way. Under the lock."""
        if self._process != os.getpid():  # a fork has none of the threads that fetch
            self._coming, self._pool, self._process = {}, None, os.getpid()
        return key in self._coming

    def _promise(self, key: _Key) -> Future[bytes]:
        """The block on its way; one for all who wait for it. Under the lock."""
        if not self._asked(key):
            self._coming[key] = Future()
        return self._coming[key]

    def _bring(self, key: _Key, coming: Future[bytes]) -> None:
        """Fetch and keep a block, unless another thread has begun to."""
        with self._lock:
            if coming.running() or coming.done():
                return
            coming.set_running_or_notify_cancel()
        try:
            data = self._fetch(key[0], key[1] * BLOCK, BLOCK)
            if data and self._usable and self._coming.get(key) is coming:
                self._keep(key, data)
            coming.set_result(data)
        except BaseException as error:  # noqa: BLE001 (raised where the block is waited for)
            coming.set_exception(error)
        finally:
            with self._lock:
                if self._coming.get(key) is coming:
                    del self._coming[key]

    def _keep(self, key: _Key, data: bytes) -> None:
        folder = self._of(key[0])
        temporary = folder / f".{key[1]}-{os.getpid()}-{threading.get_ident()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(folder / str(key[1]))
        except FileNotFoundError:  # somebody cleared the cache meanwhile
            return
        except OSError as error:
            self._give_up(error)
            with suppress(OSError):
                temporary.unlink()
            return
        self._written += len(data)
        if self._written > self._limit * _LOOK_EVERY:
            self._written = 0
            self._make_room()

    def _give_up(self, error: OSError) -> None:
        """Say once that there is no cache from now on."""
        with self._lock:
            first, self._usable = self._usable, False
        if first:
            logger.warning(
                "the cache %s cannot be written (%s): reading goes on without it; make room or set "
                "SDN_CACHE to another place",
                self._folder,
                error.strerror or error,
            )

    def _make_room(self) -> None:
        """Delete the blocks used longest ago while all take more than the limit; one at a time."""
        from filelock import FileLock

        # Another process is at it, or the folder is somebody else's: reading goes on all the same.
        with suppress(OSError), FileLock(self._folder / "eviction.lock", timeout=0):
            blocks = []
            for path in self._folder.glob("*/*"):
                with suppress(FileNotFoundError):
                    about = path.stat()
                    if not _in_the_making(path) or time.time() - about.st_mtime > _LEFT_S:
                        blocks.append((about.st_mtime, about.st_size, path))
            total = sum(size for _, size, _ in blocks)
            for _, size, path in sorted(blocks) if total > self._limit else ():
                path.unlink(missing_ok=True)
                total -= size
                if total <= 0.9 * self._limit:
                    break

    def _of(self, name: str) -> Path:
        folder = self._folders.get(name)
        if folder is None:
            digest = hashlib.sha256(f"{self._scope} {name}".encode()).hexdigest()[:32]
            if len(self._folders) >= _KNOWN_NAMES:
                self._folders.clear()
            folder = self._folders[name] = self._folder / digest
        return folder


def _in_the_making(path: Path) -> bool:
    """Whether some process is writing this block; deleted, that process would miss it."""
    return path.name.startswith(".")


def _open_block(path: str) -> int | None:
    """A descriptor of the block, its time of use set at most once a minute; None without one."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    about = os.fstat(descriptor)
    if not about.st_size:  # left by a power cut: its name was on disk before its bytes
        os.close(descriptor)
        return None
    if time.time() - about.st_mtime > _TOUCH_S:
        with suppress(OSError):  # somebody else's block
            os.utime(path)
    return descriptor

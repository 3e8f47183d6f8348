"""The cache of blocks, with a server that is a function."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from pathlib import Path

import pytest

from pipelines import s3_cache
from pipelines.s3_cache import BLOCK, BlockCache

SIZE = 3 * BLOCK + 1000
DATA = random.Random(0).randbytes(SIZE)


class Server:
    """Has `DATA` under every name; keeps what was asked of it."""

    def __init__(self, wait_s: float = 0.0) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.wait_s = wait_s

    def __call__(self, name: str, offset: int, length: int) -> bytes:
        self.asked.append((name, offset, length))
        time.sleep(self.wait_s)
        return DATA[offset : offset + length]


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def cache_of(folder, server, limit_gib=1.0):
    return BlockCache(folder, "here", limit_gib, server)


def test_each_block_is_asked_for_once(tmp_path):
    """Ranges over blocks and past the end are those of the file; a second pass asks nothing."""
    server = Server()
    cache = cache_of(tmp_path, server)
    places = [(0, 10), (BLOCK - 5, 10), (0, SIZE), (SIZE - 5, 10), (SIZE + 5, 10), (7, 0)]
    assert all(cache.read("x", at, size) == DATA[at : at + size] for at, size in places * 2)
    blocks = [offset for _, offset, length in server.asked if offset < 4 * BLOCK]
    assert sorted(set(blocks)) == [0, BLOCK, 2 * BLOCK, 3 * BLOCK]
    cache.close()
    server.asked.clear()
    again = cache_of(tmp_path, server)
    assert again.read("x", 0, SIZE) == DATA
    assert not server.asked
    again.close()


def test_readers_do_not_queue_for_each_other(tmp_path):
    """Eight threads that miss eight blocks wait about as long as one."""
    server = Server(wait_s=0.3)
    cache = cache_of(tmp_path, server)
    cache.prefetch("ahead", 0, 40 * BLOCK)
    began = time.monotonic()
    threads = [threading.Thread(target=cache.read, args=(f"{n}", 0, 5)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 2
    # One that still waits for the fetching threads is read at once, and not twice.
    assert cache.read("ahead", 39 * BLOCK, 5) == b""
    assert time.monotonic() - began < 2
    cache.close()


def test_what_was_fetched_ahead_is_not_asked_again(tmp_path):
    """The reader that comes while it is on its way waits for it."""
    server = Server(wait_s=0.1)
    cache = cache_of(tmp_path, server)
    cache.prefetch("x", 0, SIZE)
    assert cache.read("x", 0, SIZE) == DATA
    cache.prefetch("x", 0, SIZE)
    cache.close()
    assert len(server.asked) == 4


def test_an_error_reaches_the_reader(tmp_path):
    """And the next one asks again."""

    def absent(*_):
        raise FileNotFoundError("there is no x")

    cache = cache_of(tmp_path, absent)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="there is no x"):
            cache.read("x", 0, 5)
    cache.close()


def test_without_a_cache_only_what_is_wanted_is_asked_for(tmp_path, caplog):
    """A cache that cannot be written: no whole blocks for a few bytes, and one warning."""
    (tmp_path / "file").write_text("no folder")
    server = Server()
    cache = cache_of(tmp_path / "file", server)
    assert all(cache.read("x", n * 10, 10) == DATA[n * 10 : n * 10 + 10] for n in range(5))
    cache.prefetch("x", 0, SIZE)
    assert server.asked[1:] == [("x", n * 10, 10) for n in range(1, 5)]
    assert len(caplog.records) == 1
    cache.close()


def test_blocks_of_somebody_else_are_used(tmp_path, monkeypatch):
    """Blocks whose time cannot be set, and a lock that cannot be made, are no errors."""
    server = Server()
    (tmp_path / "eviction.lock").mkdir()
    cache = cache_of(tmp_path, server, BLOCK / 2**30)
    cache.read("x", 0, SIZE)
    cache.close()
    for block in tmp_path.glob("*/*"):
        os.utime(block, (0, 0))

    def refuses(*_, **__):
        raise PermissionError(1, "no")

    monkeypatch.setattr(os, "utime", refuses)
    monkeypatch.setattr(s3_cache, "_TOUCH_S", 0.0)
    server.asked.clear()
    before = _open_files()
    assert all(cache.read("x", 0, 5) == DATA[:5] for _ in range(20))
    assert _open_files() <= before + 1
    assert not server.asked
    cache.close()


def test_a_block_without_bytes_is_fetched_again(tmp_path):
    """After a power cut a name may be there without its bytes."""
    cache = cache_of(tmp_path, Server())
    cache.read("x", 0, 5)
    cache.close()
    next(tmp_path.glob("*/0")).write_bytes(b"")
    assert cache.read("x", 0, 5) == DATA[:5]
    cache.close()


def test_what_was_on_its_way_when_forgotten_is_not_kept(tmp_path):
    """The next reader asks the server."""
    server = Server(wait_s=0.2)
    cache = cache_of(tmp_path, server)
    reader = threading.Thread(target=cache.read, args=("x", 0, 5))
    reader.start()
    time.sleep(0.1)
    cache.forget("x")
    reader.join()
    assert not list(tmp_path.glob("*/*"))
    assert cache.read("x", 0, 5) == DATA[:5]
    assert len(server.asked) == 2
    cache.close()


def test_the_blocks_used_longest_ago_go_first(tmp_path):
    """Use counts, to the minute, not only the time of fetching."""
    cache = cache_of(tmp_path, Server(), 3.5 * BLOCK / 2**30)
    for name in "abc":
        cache.read(name, 0, 5)
    cache.close()
    for age, name in enumerate("cba"):
        os.utime(cache._of(name) / "0", (time.time() - 1000 - age,) * 2)
    cache.read("a", 0, 5)  # the oldest is used
    cache.read("d", 0, 5)
    assert {name for name in "abcd" if (cache._of(name) / "0").exists()} == set("acd")
    cache.close()


def _hammer(folder, seed, answers):
    cache = cache_of(folder, Server(), 6 * BLOCK / 2**30)
    draw = random.Random(seed)
    wrong = 0
    for _ in range(300):
        name, at, size = draw.choice("abcd"), draw.randrange(SIZE), draw.randrange(BLOCK)
        wrong += cache.read(name, at, size) != DATA[at : at + size]
        if draw.random() < 0.02:
            cache.forget(name)
    cache.close()
    answers.put((wrong, cache._usable))


def test_processes_that_share_it_while_blocks_are_deleted(tmp_path):
    """No wrong byte, no reader without its cache, and the limit holds."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    workers = [context.Process(target=_hammer, args=(tmp_path, n, answers)) for n in range(3)]
    for worker in workers:
        worker.start()
    assert [answers.get() for _ in workers] == [(0, True)] * 3
    for worker in workers:
        worker.join()
    kept = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    assert kept <= (6 + 3) * BLOCK  # each process may have written a block since the last look


def test_what_a_killed_process_left_goes(tmp_path):
    """A part of a block, an hour old, is deleted to make room; a fresh one is being written."""
    cache = cache_of(tmp_path, Server(), 1.5 * BLOCK / 2**30)
    cache.read("x", 0, 5)
    old, fresh = cache._of("x") / ".7-1-1", cache._of("x") / ".8-1-1"
    for path in (old, fresh):
        path.write_bytes(bytes(BLOCK))
    os.utime(old, (time.time() - 5000,) * 2)
    cache.read("x", BLOCK, 5)
    assert not old.exists()
    assert fresh.exists()
    cache.close()

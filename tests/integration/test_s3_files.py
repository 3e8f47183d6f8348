"""Files on a real S3 server: read, written, cached, and what goes wrong said clearly."""

from __future__ import annotations

import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import pytest
from faulty_proxy import FaultyProxy

from pipelines.s3_cache import BLOCK
from pipelines.s3_files import S3Files

SHARES = {"503": 0.05, "reset": 0.01, "cut": 0.01}


def files_at(server, prefix, **options):
    return S3Files(f"s3://data/{prefix}", endpoint=server.endpoint, **options)


def test_files_are_written_listed_read_and_removed(user):
    """What one process writes another lists and reads, whole, in ranges and in sequence."""
    files = pickle.loads(pickle.dumps(files_at(user, "basic")))
    files.prepare()
    data = random.Random(0).randbytes(9 << 20)
    files.write("a/one.bin", data)
    files.write(".hidden", b"x")
    with files.writing("two.bin") as out:
        out.write(b"two")
        assert not files.exists("two.bin")
    assert {(info.name, info.size) for info in files.walk()} == {
        ("a/one.bin", len(data)),
        ("two.bin", 3),
    }
    assert [info.name for info in files.walk("a")] == ["a/one.bin"]
    assert files.exists("two.bin")
    assert not files.exists("three.bin")
    assert files.size("a/one.bin") == len(data)
    assert files.read("a/one.bin") == data
    assert files.read_range("a/one.bin", 5, 10) == data[5:15]
    assert files.read_range("a/one.bin", len(data) - 3, 10) == data[-3:]
    assert files.read_range("a/one.bin", len(data) + 5, 10) == b""
    with files.open("a/one.bin") as file:
        assert file.read(100) == data[:100]
        file.seek(-50, 2)
        assert file.read() == data[-50:]
    files.remove("a/one.bin")
    with pytest.raises(FileNotFoundError, match=r"there is no s3://data/basic/a/one\.bin"):
        files.read("a/one.bin")


def test_a_failed_write_leaves_nothing(user):
    """An error while a file is being filled: nothing appears on the server."""
    files = files_at(user, "failed")

    def write():
        with files.writing("half.bin") as out:
            out.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert not files.exists("half.bin")


def test_large_files_go_in_parts_and_come_back(user):
    """A file of several parts arrives whole."""
    files = files_at(user, "large")
    data = random.Random(1).randbytes(40 << 20)
    files.write("large.bin", data)
    with files.open("large.bin") as file:
        assert file.read() == data


def test_the_cache_is_shared_limited_and_can_forget(user, tmp_path):
    """A second reader finds the blocks; the limit holds; a forgotten file is asked for again."""
    files = files_at(user, "cached")
    data = random.Random(2).randbytes(5 * BLOCK + 100)
    files.write("x.bin", data)
    cache = tmp_path / "cache"
    one = files_at(user, "cached", cache=cache)
    two = files_at(user, "cached", cache=cache)
    assert one.read_range("x.bin", 3 * BLOCK - 10, 20) == data[3 * BLOCK - 10 : 3 * BLOCK + 10]
    assert len(list(cache.glob("blocks/*/*"))) == 2
    files.remove("x.bin")
    assert two.read_range("x.bin", 3 * BLOCK, 20) == data[3 * BLOCK : 3 * BLOCK + 20]
    two.forget("x.bin")
    with pytest.raises(FileNotFoundError):
        two.read_range("x.bin", 3 * BLOCK, 20)
    files.write("y.bin", data)
    small = files_at(user, "cached", cache=tmp_path / "small", cache_gib=3 * BLOCK / 2**30)
    assert small.read_range("y.bin", 0, len(data)) == data
    kept = [path.stat().st_size for path in (tmp_path / "small").glob("blocks/*/*")]
    assert sum(kept) <= 1.05 * 3 * BLOCK  # looked after each twentieth of the limit
    assert small.read_range("y.bin", 0, len(data)) == data
    for some in (one, two, small):
        some.close()


def test_a_cache_that_cannot_be_written_is_done_without(user, tmp_path, caplog):
    """Where the cache's disk refuses, reading goes on, with one warning."""
    files_at(user, "nocache").write("x.bin", b"some bytes")
    (tmp_path / "cache").write_text("a file where the folder should be")
    files = files_at(user, "nocache", cache=tmp_path / "cache")
    for _ in range(3):
        assert files.read_range("x.bin", 5, 5) == b"bytes"
    assert sum("cannot be written" in record.message for record in caplog.records) == 1
    files.close()


def test_threads_share_one_request(user, tmp_path):
    """Many threads that want the same block at once ask the server for it once."""
    files_at(user, "shared").write("x.bin", bytes(BLOCK))
    files = files_at(user, "shared", cache=tmp_path)
    asked = []
    original = files._blocks._fetch

    def counting(*place):
        asked.append(place)
        time.sleep(0.2)
        return original(*place)

    files._blocks._fetch = counting
    start = threading.Barrier(8)

    def read(number):
        start.wait()
        return files.read_range("x.bin", number * 10, 10)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [bytes(10)] * 8
    assert len(asked) == 1
    files.close()


def test_not_one_wrong_byte_from_a_server_that_fails(user):
    """503s, resets and cut bodies: 2,400 ranged reads by 8 threads are all right."""
    data = random.Random(3).randbytes(6 << 20)
    files_at(user, "faulty").write("x.bin", data)
    draw = random.Random(4)
    places = [(draw.randrange(len(data) - 20_000), draw.randrange(1, 20_000)) for _ in range(2400)]
    host, port = urlsplit(user.endpoint).hostname, urlsplit(user.endpoint).port
    seconds = {}
    for name, shares in (("sound", {}), ("faulty", SHARES)):
        with FaultyProxy(host, port, shares) as proxy:
            files = S3Files("s3://data/faulty", endpoint=proxy.endpoint)
            began = time.perf_counter()
            with ThreadPoolExecutor(8) as pool:
                starts, lengths = zip(*places, strict=True)
                found = list(pool.map(partial(files.read_range, "x.bin"), starts, lengths))
            seconds[name] = time.perf_counter() - began
            assert all(
                piece == data[start : start + length]
                for piece, (start, length) in zip(found, places, strict=True)
            )
            if shares:
                failed = {fault: proxy.counts[fault] for fault in shares}
                assert failed["503"] > 80
                assert failed["reset"] > 10
                assert failed["cut"] > 10
                assert proxy.counts.total() == len(places) + sum(failed.values())
    print(f"{seconds['faulty'] / seconds['sound']:.2f} times the time through a sound proxy")


@pytest.mark.parametrize(
    ("access", "secret", "uri", "text"),
    [
        ("key", "wrong", "s3://data/x", "AWS_SECRET_ACCESS_KEY does not belong"),
        ("stranger", "secret", "s3://data/x", "does not know AWS_ACCESS_KEY_ID"),
        ("key", "secret", "s3://nobucket/x", "may not do that|no such bucket"),
        ("owner", "secret", "s3://nobucket/x", "there is no such bucket"),
        ("reader", "secret", "s3://data/x", "these credentials may not do that"),
    ],
    ids=["wrong secret", "unknown key", "foreign bucket", "missing bucket", "read-only"],
)
def test_places_that_cannot_be_written_are_named(server, monkeypatch, access, secret, uri, text):
    """Each reason has an error of its own, at once and before any work."""
    for name, value in server.keys(access, secret).items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"{uri} cannot be written: .*({text})"):
        S3Files(uri, endpoint=server.endpoint).prepare()
    assert time.monotonic() - began < 15, "a refusal must not be waited for"


def test_an_unreachable_server_is_named(user):
    """Nobody listens: the error names the endpoint and what to check."""
    files = S3Files("s3://data/x", endpoint="http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9.*SDN_S3_ENDPOINT"):
        files.prepare()


def test_missing_credentials_are_named(server, monkeypatch):
    """Without credentials the error says which variables to set."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(ValueError, match="no credentials: set AWS_ACCESS_KEY_ID"):
        S3Files("s3://data/x", endpoint=server.endpoint).prepare()

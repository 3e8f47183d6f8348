"""How much S3 files ask of a real server, and what they make of one that fails or is silent."""

from __future__ import annotations

import io
import random
import socket
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from faulty_proxy import FaultyProxy
from gate import Gate

from pipelines.s3 import S3Store
from pipelines.s3_files import S3Files


def files_at(server, prefix, **options):
    return S3Files(f"s3://data/{prefix}", endpoint=server.endpoint, **options)


def proxy_to(server, shares, **options):
    place = urlsplit(server.endpoint)
    return FaultyProxy(place.hostname, place.port, shares, **options)


def test_a_tar_is_read_in_few_requests(user):
    """Member by member, a tar costs a request for each 8 MiB."""
    whole = io.BytesIO()
    members = {f"{n:05d}.bin": random.Random(n).randbytes(3000 + n) for n in range(6000)}
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    files_at(user, "tar").write("x.tar", whole.getvalue())
    with proxy_to(user, {}) as proxy:
        files = S3Files("s3://data/tar", endpoint=proxy.endpoint)
        with files.open("x.tar") as file, tarfile.open(fileobj=file) as tar:
            assert {info.name: tar.extractfile(info).read() for info in tar} == members
        assert proxy.counts["none"] <= len(whole.getvalue()) / (8 << 20) + 2
        files.close()


def test_a_changed_byte_in_a_whole_file_is_noticed(user):
    """Its checksum came along: the file is asked for again."""
    data = random.Random(5).randbytes(50_000)
    files_at(user, "flipped").write("x.bin", data)
    with proxy_to(user, {"flip": 0.3}) as proxy:
        files = S3Files("s3://data/flipped", endpoint=proxy.endpoint)
        assert all(files.read("x.bin") == data for _ in range(40))
        assert proxy.counts["flip"] > 5
        assert proxy.counts.total() == 40 + proxy.counts["flip"]
        files.close()


def test_a_large_file_is_sent_past_faults_part_by_part(user):
    """Only the part that failed is sent again."""
    data = random.Random(6).randbytes(128 << 20)
    with proxy_to(user, {"503": 0.3}, method="PUT") as proxy:
        files = S3Files("s3://data/sent", endpoint=proxy.endpoint)
        for name in ("a.bin", "b.bin"):
            files.write(name, data)
        failed = proxy.counts["503"]
        assert failed > 0
        assert proxy.counts.total() == 2 * 8 + failed
        files.close()
    for name in ("a.bin", "b.bin"):
        assert files_at(user, "sent").read(name) == data


def test_marks_of_folders_are_no_files(user):
    """What consoles put into a bucket to show a folder is not listed."""
    files = files_at(user, "marked")
    user.client.put_object(Bucket="data", Key="marked/", Body=b"")
    user.client.put_object(Bucket="data", Key="marked/folder/", Body=b"")
    files.write("folder/x", b"1")
    assert [info.name for info in files.walk()] == ["folder/x"]


@pytest.mark.parametrize("accepts", [True, False], ids=["never answers", "never accepts"])
def test_a_silent_server_is_not_waited_for(user, accepts):
    """Before any work a server that says nothing is named within a quarter of a minute."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64 if accepts else 0)
        waiting = [socket.socket() for _ in range(0 if accepts else 4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(silent.getsockname())
        port = silent.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(ValueError, match=rf"cannot be written: .*:{port} .*SDN_S3_ENDPOINT"):
            S3Files("s3://data/x", endpoint=f"http://127.0.0.1:{port}").prepare()
        assert time.monotonic() - began < 15
        for client in waiting:
            client.close()


def test_a_server_that_is_away_is_waited_for(user, tmp_path):
    """For longer than ten tries take: a read, a write and a folder of results go through."""
    with Gate(int(user.endpoint.rpartition(":")[2])) as gate:
        endpoint = f"http://127.0.0.1:{gate.port}"
        files = S3Files("s3://data/away", endpoint=endpoint)
        store = S3Store("s3://data/away", tmp_path, endpoint)
        files.write("x.bin", b"some bytes")
        (store.workspace("made") / "result").write_text("whole")
        gate.shut()
        threading.Timer(25, gate.open).start()
        began = time.monotonic()
        with ThreadPoolExecutor() as pool:
            read = pool.submit(files.read, "x.bin")
            written = pool.submit(files.write, "y.bin", b"more")
            published = pool.submit(store.publish, "made", {"n": 1})
            assert read.result() == b"some bytes"
            written.result()
            published.result()
        assert time.monotonic() - began > 20, "it was not away"
        assert files.read("y.bin") == b"more"
        assert store.done("made") == {"n": 1}

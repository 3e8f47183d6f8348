"""S3 files on a server inside this process (moto): what is asked again, and what is not."""

from __future__ import annotations

import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from botocore.exceptions import ClientError, IncompleteReadError, ReadTimeoutError
from moto import mock_aws
from urllib3.exceptions import ProtocolError

from pipelines.s3 import S3Store
from pipelines.s3_files import S3Files
from pipelines.s3_patience import asking_again


@pytest.fixture
def files(monkeypatch):
    """`s3://data/set` with the file `x`."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket="data")
        found = S3Files("s3://data/set")
        found.write("x", b"0123456789")
        yield found
        found.close()


def test_whether_anything_lies_there(files):
    """Names of other prefixes do not count, nor does what marks a folder."""
    assert files.holds_files()
    files.client.put_object(Bucket="data", Key="set-2/x", Body=b"")
    files.client.put_object(Bucket="data", Key="empty/", Body=b"")
    assert S3Files("s3://data").holds_files()
    for prefix in ("set-", "empty", "nowhere"):
        assert not S3Files(f"s3://data/{prefix}").holds_files()


def test_nobody_waits_to_learn_that_a_server_is_away(monkeypatch):
    """A few tries in some seconds, where others have minutes; the address is named."""
    patience = []

    def noted(**given):
        patience.append(given)
        return asking_again(**given)

    monkeypatch.setattr("pipelines.s3_files.asking_again", noted)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    place = S3Files("s3://data/set", endpoint="http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"s3://data/set cannot be listed.*127\.0\.0\.1:9 answers"):
        place.holds_files()
    ((tries, seconds),) = ((one["tries"], one["seconds"]) for one in patience)
    assert tries <= 3
    assert seconds <= 10


def refusal(code, status):
    about = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(about, "GetObject")


def short(_):
    """An answer whose body ends early."""
    body = io.BytesIO(b"012")
    return {"Body": body, "ContentLength": 10, "ContentRange": "bytes 0-9/10"}


def shrunk(_):
    """An answer that is whole, but less than what was asked for."""
    body = io.BytesIO(b"012")
    return {"Body": body, "ContentLength": 3, "ContentRange": "bytes 0-2/10"}


def failing(files, *faults):
    """`files` fails this way, then works; the list grows with each request."""
    asked, real = [], files.client.get_object
    left = list(faults)

    def get_object(**request):
        asked.append(request)
        if not left:
            return real(**request)
        fault = left.pop(0)
        if isinstance(fault, Exception):
            raise fault
        return fault(request)

    files.client.get_object = get_object
    return asked


PASSING = [
    refusal("SlowDown", 503),
    refusal("InternalError", 500),
    refusal("502", 502),
    refusal("TooManyRequests", 429),
    refusal("RequestTimeout", 400),
    ReadTimeoutError(endpoint_url="http://x"),
    IncompleteReadError(actual_bytes=1, expected_bytes=2),
    ProtocolError("Connection broken"),
    ConnectionResetError(104, "reset"),
    short,
    shrunk,
]


@pytest.mark.parametrize(
    "fault", PASSING, ids=lambda fault: getattr(fault, "__name__", repr(fault))
)
def test_what_may_pass_is_asked_again(files, fault):
    """One request more for each fault, and the right bytes."""
    asked = failing(files, fault, fault)
    assert files.read_range("x", 0, 10) == b"0123456789"
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (refusal("AccessDenied", 403), OSError, "may not do that"),
        (refusal("InvalidAccessKeyId", 403), OSError, "does not know AWS_ACCESS_KEY_ID"),
        (refusal("SignatureDoesNotMatch", 403), OSError, "AWS_SECRET_ACCESS_KEY does not"),
        (refusal("NoSuchBucket", 404), OSError, "no such bucket"),
        (refusal("NotImplemented", 501), OSError, "SDN_S3_ENDPOINT"),
        (refusal("NoSuchKey", 404), FileNotFoundError, "there is no s3://data/set/x"),
    ],
    ids=lambda value: getattr(value, "response", {}).get("Error", {}).get("Code", ""),
)
def test_what_stays_is_raised_at_once(files, fault, kind, text):
    """One request, and an error that names the place."""
    asked = failing(files, fault)
    with pytest.raises(kind, match=text) as caught:
        files.read_range("x", 0, 10)
    assert "s3://data/set/x" in str(caught.value)
    assert len(asked) == 1


def test_a_listing_of_many_pages(files):
    """More names than one answer holds; hidden ones are left out."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: files.write(f"a/{n:04d}", b"x"), range(1100)))
    for hidden in (".b", "a/.c", ".d/e"):
        files.write(hidden, b"")
    assert len(list(files.walk())) == 1101
    assert sorted(info.name for info in files.walk("a")) == [f"a/{n:04d}" for n in range(1100)]
    before = {info.name: info.stamp for info in files.walk()}
    files.write("x", b"another")
    after = {info.name: info.stamp for info in files.walk()}
    assert {name for name in before if before[name] != after[name]} == {"x"}


def test_ranges_end_where_the_file_does(files):
    """As a positioned read of a file on disk."""
    assert files.read_range("x", 8, 5) == b"89"
    assert files.read_range("x", 10, 5) == b""
    assert files.read_range("x", 99, 5) == b""
    assert files.read_range("x", 0, 0) == b""
    files.write("empty", b"")
    assert files.read_range("empty", 0, 5) == b""


def test_no_connection_goes_to_another_process(files, monkeypatch):
    """Neither through a pickle nor through a fork."""
    client = files.client
    again = pickle.loads(pickle.dumps(files))
    assert (again.uri, again._clients) == (files.uri, {})
    assert files.client is client
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert files.client is not client


def test_a_bucket_that_is_not_there(files):
    """It is named before anything is written."""
    with pytest.raises(ValueError, match="s3://nobucket/x cannot be written: there is no such"):
        S3Files("s3://nobucket/x").prepare()


def test_the_store_sends_and_fetches(files, tmp_path):
    """A folder of results as it was, on a machine without the local copy."""
    store = S3Store("s3://data/runs", tmp_path / "one")
    store.check()
    folder = store.workspace("stages/a")
    (folder / "part").mkdir()
    (folder / "part" / "model.pt").write_bytes(bytes(range(256)))
    store.publish("stages/a", {"loss": 0.5})
    other = S3Store("s3://data/runs", tmp_path / "two")
    assert other.done("stages/a") == {"loss": 0.5}
    assert (other.fetch("stages/a") / "part" / "model.pt").read_bytes() == bytes(range(256))

"""Files at `s3://bucket/prefix`, by boto3: every answer is checked, and asked for again if need be.

Back-off of what is read happens here: botocore's own retries know nothing of a body that breaks
off. What is sent botocore asks for again itself, each part of a large file by itself.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import threading
import uuid
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, cast
from urllib.parse import urlsplit

from sdn.data.files import FileInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from tenacity import RetryCallState, Retrying

    from pipelines.s3_cache import BlockCache

    T = TypeVar("T")

_MIB = 1 << 20
_READ_AHEAD = 8 * _MIB
_MULTIPART = 16 * _MIB
_ATTEMPTS, _PROBES = 10, 3
PATIENCE_S = 150.0
"""How long a server may be away in mid-run, in seconds: a restart, a minute without network."""
_PROBE_S = 10
_PASSING = {"500", "502", "503", "504", "429", "InternalError", "SlowDown", "ServiceUnavailable"}
_PASSING |= {"RequestTimeout", "RequestTimeoutException", "Throttling", "TooManyRequests"}
"""Error codes of answers that another attempt may get past."""
_PASSING_STATUSES = {429, 500, 502, 503, 504}
_ABSENT = {"NoSuchKey", "404", "NotFound"}


class TruncatedError(OSError):
    """A body that ended before its announced length."""


class _NoBucketError(OSError):
    """There is no bucket of this name."""

    response: ClassVar = {"Error": {"Code": "NoSuchBucket"}}


def make_client(
    endpoint: str | None, *, attempts: int = 1, connect_s: float = 5, read_s: float = 30
) -> Any:
    """A boto3 client; `attempts` above 1 let it ask again by itself, with back-off."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=connect_s,
        read_timeout=read_s,
        max_pool_connections=32,
    )
    # A session of its own: the default one is not for several threads.
    return boto3.Session().client("s3", endpoint_url=endpoint, config=config)


_READING: dict[str, Any] = {}
_SENDING = {"attempts": 8}
_PROBING = {"connect_s": 4, "read_s": 10}
"""Options of the clients for each use."""


def upload(client: Any, bucket: str, key: str, file: BinaryIO) -> None:
    """Send a file with checksums that the server verifies, in parts if it is large."""
    from boto3.s3.transfer import TransferConfig

    client.upload_fileobj(
        _Unclosed(file),  # boto3 closes what it is given
        bucket,
        key,
        ExtraArgs={"ChecksumAlgorithm": "SHA256"},
        Config=TransferConfig(multipart_threshold=_MULTIPART, multipart_chunksize=_MULTIPART),
    )


class S3Files:
    """The files below `s3://bucket/prefix`; see `sdn.data.files.Files`. For several threads."""

    def __init__(
        self,
        uri: str,
        *,
        endpoint: str | None = None,
        cache: Path | None = None,
        cache_gib: float = 8.0,
    ) -> None:
        """Nothing is asked of the server yet.

        Args:
            uri: `s3://bucket/prefix`.
            endpoint: of a server that is not Amazon's.
            cache: folder for blocks read by `read_range`; shared by all processes of the machine.
            cache_gib: what the blocks of all may take, in GiB.
        """
        parts = urlsplit(uri)
        self.uri = uri.rstrip("/")
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._endpoint, self._cache, self._cache_gib = endpoint, cache, cache_gib
        self._lock = threading.Lock()
        self._clients: dict[str, Any] = {}
        self._process = os.getpid()
        self._blocks: BlockCache | None = None
        if cache is not None:
            from pipelines.s3_cache import BlockCache

            scope = f"{endpoint} {self.uri}"
            self._blocks = BlockCache(cache / "blocks", scope, cache_gib, self._range)

    def __reduce__(self) -> tuple[Callable[..., S3Files], tuple[Any, ...]]:
        """Without client and open files."""
        return _again, (self.uri, self._endpoint, self._cache, self._cache_gib)

    @property
    def client(self) -> Any:
        """The client of this process for reading, made at its first use."""
        return self._client_for(_READING)

    def _client_for(self, use: dict[str, Any]) -> Any:
        with self._lock:
            if self._process != os.getpid():  # a fork must not share connections
                self._clients, self._process = {}, os.getpid()
            if str(use) not in self._clients:
                self._clients[str(use)] = make_client(self._endpoint, **use)
            return self._clients[str(use)]

    def key(self, name: str) -> str:
        """Key of a file in its bucket."""
        return f"{self._prefix}/{name}" if self._prefix else name

    def walk(self, below: str = "") -> Iterator[FileInfo]:
        """As in `Files`."""
        root = f"{self._prefix}/" if self._prefix else ""
        where = f"{root}{below}/" if below else root
        token: dict[str, str] = {}
        while True:
            page = self._try(
                "listed",
                lambda token=token: self.client.list_objects_v2(  # type: ignore[misc]
                    Bucket=self._bucket, Prefix=where, **token
                ),
            )
            for found in page.get("Contents", ()):
                name = found["Key"][len(root) :]
                marks_folder = not name or name.endswith("/")
                if not marks_folder and not any(p.startswith(".") for p in name.split("/")):
                    yield FileInfo(name, found["Size"], found["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def holds_files(self) -> bool:
        """As in `Files`; hidden names count, too, for the first page alone is read."""
        ask = partial(
            self._client_for(_PROBING).list_objects_v2, Bucket=self._bucket, Prefix=self.key("")
        )
        found = self._try("listed", ask, tries=_PROBES, seconds=_PROBE_S)
        return any(not one["Key"].endswith("/") for one in found.get("Contents", ()))

    def exists(self, name: str) -> bool:
        """As in `Files`."""
        try:
            self._head(name)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        """As in `Files`."""
        return int(self._head(name)["ContentLength"])

    def sha256(self, name: str) -> str:
        """As in `Files`."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            while piece := file.read(_READ_AHEAD):
                digest.update(piece)
        return digest.hexdigest()

    def read(self, name: str) -> bytes:
        """As in `Files`."""
        return self._try("read", lambda: self._get(name)[0], name)

    def open(self, name: str) -> BinaryIO:
        """As in `Files`; asks for 8 MiB at a time."""
        return cast("BinaryIO", io.BufferedReader(_Ranged(self, name), _READ_AHEAD))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """As in `Files`; through the cache, where there is one."""
        if self._blocks is not None:
            return self._blocks.read(name, offset, length)
        return self._range(name, offset, length)

    def prefetch(self, name: str, offset: int, length: int) -> None:
        """Begin to bring a range into the cache; nothing where there is no cache."""
        if self._blocks is not None:
            self._blocks.prefetch(name, offset, length)

    def forget(self, name: str) -> None:
        """Drop what the cache has of a file: it is to be read from the server again."""
        if self._blocks is not None:
            self._blocks.forget(name)

    def prepare(self) -> None:
        """As in `Files`."""
        client = self._client_for(_PROBING)
        probe = {"Bucket": self._bucket, "Key": self.key(f".probe-{uuid.uuid4().hex}")}
        try:
            self._probe(partial(_require_bucket, client, self._bucket))
            self._probe(partial(client.put_object, **probe, Body=b""))
            self._probe(partial(client.delete_object, **probe))
        except OSError as error:
            raise ValueError(str(error)) from error

    def write(self, name: str, data: bytes) -> None:
        """As in `Files`."""
        self._upload(name, io.BytesIO(data))

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """As in `Files`: a temporary file on this machine, sent when it is complete."""
        with tempfile.TemporaryFile(prefix="sdn-upload-") as file:
            yield cast("BinaryIO", file)
            self._upload(name, cast("BinaryIO", file))

    def remove(self, name: str) -> None:
        """As in `Files`."""
        place = {"Bucket": self._bucket, "Key": self.key(name)}
        self._try("written", lambda: self.client.delete_object(**place), name)
        self.forget(name)

    def close(self) -> None:
        """As in `Files`."""
        if self._blocks is not None:
            self._blocks.close()
        with self._lock:
            while self._clients:
                self._clients.popitem()[1].close()

    def _probe(self, ask: Callable[[], Any]) -> None:
        self._try("written", ask, tries=_PROBES, seconds=_PROBE_S)

    def _head(self, name: str) -> Any:
        place = {"Bucket": self._bucket, "Key": self.key(name)}
        return self._try("read", lambda: self.client.head_object(**place), name)

    def _range(self, name: str, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        wanted = f"bytes={offset}-{offset + length - 1}"

        def ask() -> bytes:
            data, total = self._get(name, Range=wanted)
            expected = max(0, min(length, total - offset))
            if len(data) < expected:
                raise TruncatedError(f"{len(data)} of {expected} bytes came")
            if len(data) > expected:  # a server that ignores ranges
                raise OSError(f"asked for {expected} bytes, got {len(data)}")
            return data

        return self._try("read", ask, name)

    def _get(self, name: str, **options: str) -> tuple[bytes, int]:
        """A whole body, and the size of the object."""
        from botocore.exceptions import ClientError

        try:
            answer = self.client.get_object(Bucket=self._bucket, Key=self.key(name), **options)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("InvalidRange", "416"):
                return b"", 0
            raise
        data: bytes = answer["Body"].read()
        if len(data) != answer["ContentLength"]:
            raise TruncatedError(f"{len(data)} of {answer['ContentLength']} bytes came")
        whole = re.search(r"/(\d+)$", answer.get("ContentRange", ""))
        return data, int(whole[1]) if whole else len(data)

    def _upload(self, name: str, file: BinaryIO) -> None:
        file.seek(0)
        client = self._client_for(_SENDING)

        def send() -> None:
            file.seek(0)
            upload(client, self._bucket, self.key(name), file)

        # One try: the client asks again for what failed, not for all parts of the file. Only a
        # server that is away for longer than the client waits is sent all of it again.
        self._try("written", send, name, tries=1)
        self.forget(name)

    def _try(
        self,
        done: str,
        ask: Callable[[], T],
        name: str = "",
        *,
        tries: int = _ATTEMPTS,
        seconds: float = PATIENCE_S,
    ) -> T:
        """Ask, again if what went wrong may pass.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the server does not do it; the text says what to look at.
        """
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        attempts = asking_again(tries=tries, seconds=seconds)
        try:
            return attempts(ask)
        except (Boto3Error, BotoCoreError, ClientError, HTTPError, OSError) as error:
            place = f"{self.uri}/{name}".rstrip("/")
            if _code(error) in _ABSENT:
                raise FileNotFoundError(f"there is no {place}") from error
            raise OSError(f"{place} cannot be {done}: {_said(error, self._endpoint)}") from error


def _require_bucket(client: Any, bucket: str) -> None:
    """Some servers would make a missing bucket at the first write, others refuse it.

    Raises:
        OSError: there is none. What else a server says to the question, the write that follows
            says better.
    """
    from botocore.exceptions import ClientError

    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        if _code(error) in _ABSENT:
            raise _NoBucketError(bucket) from error
        if _passing(error):
            raise


class _Unclosed(io.RawIOBase):
    """A file that stays open when its reader closes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


class _Ranged(io.RawIOBase):
    """An object for reading at any place, each read a request of its own."""

    def __init__(self, files: S3Files, name: str) -> None:
        self._files, self._name = files, name
        self._size = files.size(name)
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = max(0, offset + (0, self._place, self._size)[whence])
        return self._place

    def tell(self) -> int:
        return self._place

    def readall(self) -> bytes:
        """Everything that is left; by itself it would come in 8 KiB a request."""
        return b"".join(iter(lambda: self.read(_READ_AHEAD), b""))

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        length = min(len(view), self._size - self._place)
        if length <= 0:
            return 0
        data = self._files._range(self._name, self._place, length)  # noqa: SLF001 (past the cache)
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


def _again(uri: str, endpoint: str | None, cache: Path | None, cache_gib: float) -> S3Files:
    return S3Files(uri, endpoint=endpoint, cache=cache, cache_gib=cache_gib)


def _code(error: BaseException) -> str:
    """The error code in a server's answer; "" where there was none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    found = re.search(r"An error occurred \((\w+)\)", str(error))  # wrapped by boto3's transfers
    return found[1] if found else ""


def _passing(error: BaseException) -> bool:
    """Whether another attempt may get past this."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        ClientError,
        ConnectionError,  # noqa: A004 (botocore's name)
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
    )
    from urllib3.exceptions import HTTPError

    if isinstance(error, (ClientError, Boto3Error)):
        status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
        return _code(error) in _PASSING or status in _PASSING_STATUSES
    broken = (ConnectionError, ConnectionResetError, HTTPClientError, HTTPError, TimeoutError)
    damaged = (FlexibleChecksumError, IncompleteReadError, TruncatedError)
    return isinstance(error, (*broken, *damaged))


def _away(error: BaseException) -> bool:
    """Whether the server was not there, rather than answered in a way that may pass."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import ConnectionError, HTTPClientError  # noqa: A004 (its name)

    if isinstance(error, Boto3Error) and error.__context__ is not None:  # of its transfers
        return _away(error.__context__)
    answer = getattr(error, "response", None) or {}  # HTTPClientError has one that is None
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    lost = (ConnectionError, ConnectionResetError, HTTPClientError, TimeoutError)
    return isinstance(error, lost) or status in {502, 503, 504}  # of whatever stands before it


def asking_again(*, tries: int = _ATTEMPTS, seconds: float = PATIENCE_S) -> Retrying:
    """Calls again what fails in a way that may pass.

    Args:
        tries: of what a server answers, or damages on the way.
        seconds: after which nothing is tried again; until then a server that is away is waited
            for, unless they are too few to wait.
    """
    from tenacity import Retrying, retry_if_exception, wait_random_exponential

    def enough(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        waited_for = seconds >= PATIENCE_S and error is not None and _away(error)
        passed = state.seconds_since_start or 0.0
        return passed >= seconds or (state.attempt_number >= tries and not waited_for)

    return Retrying(
        retry=retry_if_exception(_passing),
        # A single fault costs some hundredths of a second, an outage is waited for longer.
        wait=wait_random_exponential(multiplier=0.03, max=5),
        stop=enough,
        reraise=True,
    )


_ADVICE = {
    "NoSuchBucket": "there is no such bucket: make it, or correct its name",
    "InvalidAccessKeyId": "the server does not know AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
    "AccessDenied": "these credentials may not do that there, or there is no such bucket: use "
    "others, or have them allowed it",
    "403": "these credentials may not do that, or the secret is wrong: check AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY",
}


def _said(error: BaseException, endpoint: str | None) -> str:
    """What the server said, and what to do."""
    from botocore.exceptions import NoCredentialsError

    if isinstance(error, NoCredentialsError):
        return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    code = _code(error)
    if code in _ADVICE:
        return f"{_ADVICE[code]} ({code})"
    server = endpoint or "Amazon's server"
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"{reason}. Check that {server} answers (SDN_S3_ENDPOINT), that the bucket exists and that "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY may use it"
    )

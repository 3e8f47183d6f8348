"""Files at `s3://bucket/prefix`, by boto3: every answer is checked, and asked for again if need be.

Back-off happens in one place, here: botocore's own retries know nothing of a body that breaks off.
"""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from sdn.data.files import FileInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from pipelines.s3_cache import BlockCache

    T = TypeVar("T")

_MIB = 1 << 20
_READ_AHEAD = 4 * _MIB
_MULTIPART = 16 * _MIB
_ATTEMPTS, _PROBES = 10, 3
_PASSING = {"500", "502", "503", "504", "429", "InternalError", "SlowDown", "ServiceUnavailable"}
_PASSING |= {"RequestTimeout", "RequestTimeoutException", "Throttling", "TooManyRequests"}
"""Error codes of answers that another attempt may get past."""
_ABSENT = {"NoSuchKey", "404", "NotFound"}


class TruncatedError(OSError):
    """A body that ended before its announced length."""


def make_client(endpoint: str | None) -> Any:
    """A boto3 client that does not retry by itself."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": 1},
        connect_timeout=5,
        read_timeout=30,
        max_pool_connections=32,
    )
    # A session of its own: the default one is not for several threads.
    return boto3.Session().client("s3", endpoint_url=endpoint, config=config)


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
        self._client: Any = None
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
        """The client of this process, made at its first use."""
        with self._lock:
            if self._client is None:
                self._client = make_client(self._endpoint)
            return self._client

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
                if not any(part.startswith(".") for part in name.split("/")):
                    yield FileInfo(name, found["Size"], found["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

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
        """As in `Files`; asks for 4 MiB at a time."""
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
        probe = {"Bucket": self._bucket, "Key": self.key(f".probe-{uuid.uuid4().hex}")}
        try:
            self._require_bucket()
            self._try("written", lambda: self.client.put_object(**probe, Body=b""), tries=_PROBES)
            self._try("written", lambda: self.client.delete_object(**probe), tries=_PROBES)
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

    def _require_bucket(self) -> None:
        """Some servers would make a missing bucket at the first write, others refuse it."""
        from botocore.exceptions import ClientError

        try:
            self.client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if _code(error) in _ABSENT:
                raise OSError(
                    f"{self.uri} cannot be written: {_ADVICE['NoSuchBucket']} ({self._bucket})"
                ) from error
        except Exception:  # noqa: BLE001, S110 (the write that follows says it, and tries again)
            pass

    def _head(self, name: str) -> Any:
        place = {"Bucket": self._bucket, "Key": self.key(name)}
        return self._try("read", lambda: self.client.head_object(**place), name)

    def _range(self, name: str, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        wanted = f"bytes={offset}-{offset + length - 1}"
        data, total = self._try("read", lambda: self._get(name, Range=wanted), name)
        expected = max(0, min(length, total - offset))
        if len(data) != expected:  # a server that ignores ranges
            raise OSError(f"{self.uri}/{name}: asked for {expected} bytes, got {len(data)}")
        return data

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
        """Send a file with a checksum that the server verifies, in parts if it is large."""
        from boto3.s3.transfer import TransferConfig

        transfer = TransferConfig(multipart_threshold=_MULTIPART, multipart_chunksize=_MULTIPART)

        def send() -> None:
            file.seek(0)
            # boto3 closes what it is given.
            kept = _Unclosed(file)
            self.client.upload_fileobj(
                kept,
                self._bucket,
                self.key(name),
                ExtraArgs={"ChecksumAlgorithm": "SHA256"},
                Config=transfer,
            )

        self._try("written", send, name)
        self.forget(name)

    def _try(self, done: str, ask: Callable[[], T], name: str = "", *, tries: int = _ATTEMPTS) -> T:
        """Ask, again if what went wrong may pass.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the server does not do it; the text says what to look at.
        """
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from tenacity import (
            Retrying,
            retry_if_exception,
            stop_after_attempt,
            stop_after_delay,
            wait_random_exponential,
        )
        from urllib3.exceptions import HTTPError

        attempts = Retrying(
            retry=retry_if_exception(_passing),
            # A single fault costs some hundredths of a second, an outage is waited for longer.
            wait=wait_random_exponential(multiplier=0.03, max=5),
            stop=stop_after_attempt(tries) | stop_after_delay(60),
            reraise=True,
        )
        try:
            return attempts(ask)
        except (Boto3Error, BotoCoreError, ClientError, HTTPError, OSError) as error:
            place = f"{self.uri}/{name}".rstrip("/")
            if _code(error) in _ABSENT:
                raise FileNotFoundError(f"there is no {place}") from error
            raise OSError(f"{place} cannot be {done}: {_said(error, self._endpoint)}") from error


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
        HTTPClientError,
        IncompleteReadError,
    )
    from urllib3.exceptions import HTTPError

    if isinstance(error, (ClientError, Boto3Error)):
        status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
        return _code(error) in _PASSING or (status is not None and status >= 500)
    kinds = (ConnectionError, HTTPClientError, IncompleteReadError, HTTPError, TruncatedError)
    return isinstance(error, (*kinds, TimeoutError)) or type(error) is ConnectionResetError


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

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

from pipelines.s3_patience import (
    ABSENT,
    ATTEMPTS,
    PATIENCE_S,
    TruncatedError,
    advice_on,
    asking_again,
    code_of,
    may_pass,
)
from sdn.data.files import FileInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from pipelines.s3_cache import BlockCache

    T = TypeVar("T")

_MIB = 1 << 20
_READ_AHEAD = 8 * _MIB
_MULTIPART = 16 * _MIB
_PROBES = 3
_PROBE_S = 10


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
        tries: int = ATTEMPTS,
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
            if code_of(error) in ABSENT:
                raise FileNotFoundError(f"there is no {place}") from error
            raise OSError(
                f"{place} cannot be {done}: {advice_on(error, self._endpoint)}"
            ) from error


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
        if code_of(error) in ABSENT:
            raise _NoBucketError(bucket) from error
        if may_pass(error):
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

"""The store on S3: what `pipelines.store` promises, with boto3 and a local copy."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.s3_files import S3Files, make_client, upload
from pipelines.s3_patience import asking_again
from pipelines.store import DONE, StoreError, clear, files_below, folder_lock, read_mark, write_mark

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sdn.data.files import Files


class S3Store:
    """`s3://bucket/prefix`. Folders are built and read in a local copy below `cache`."""

    def __init__(self, uri: str, cache: Path, endpoint: str | None = None) -> None:
        parts = urlsplit(uri)
        self.uri = uri.rstrip("/")
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        digest = hashlib.sha256(f"{endpoint}{self.uri}".encode()).hexdigest()[:12]
        self._endpoint, self._shared_cache = endpoint, cache.expanduser()
        self.cache = self._shared_cache / digest
        self.client = make_client(endpoint, attempts=6)

    def key(self, name: str) -> str:
        """Key of a file of the store in its bucket."""
        return f"{self.prefix}/{name}" if self.prefix else name

    @contextmanager
    def reaching(self, done: str) -> Iterator[None]:
        """What boto3 raises inside becomes a StoreError; `done` says what cannot be done."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise StoreError(
                f"store {self.uri} cannot be {done} ({error}): check that the bucket exists, the "
                "credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) may use it, and "
                "SDN_S3_ENDPOINT names the server; what is finished there stays"
            ) from error

    def check(self) -> None:
        """As in `Store`."""
        key = self.key(".probe")
        with self.reaching("written"):
            self.client.put_object(Bucket=self.bucket, Key=key, Body=b"")
            self.client.delete_object(Bucket=self.bucket, Key=key)

    def done(self, name: str) -> dict[str, Any] | None:
        """As in `Store`."""
        mark = self._mark(name)
        return None if mark is None else mark["result"]

    def _mark(self, name: str) -> dict[str, Any] | None:
        """`result` and `files` of a finished folder."""
        key = self.key(f"{name}/{DONE}")

        def ask() -> dict[str, Any] | None:
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=key)
            except self.client.exceptions.NoSuchKey:
                return None
            found: dict[str, Any] = json.loads(answer["Body"].read())
            return found

        with self.reaching("read"):
            return asking_again()(ask)

    def workspace(self, name: str) -> Path:
        """As in `Store`."""
        folder = self.cache / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def lock(self, name: str) -> AbstractContextManager[object]:
        """As in `Store`: among the processes that share this local copy."""
        return folder_lock(self.cache, name)

    def publish(self, name: str, result: dict[str, Any]) -> None:
        """As in `Store`: files with checksums first, then the mark that lists them."""
        folder = self.cache / name
        names = []
        with self.reaching("written"):
            for path in files_below(folder):
                names.append(str(path.relative_to(folder)))
                asking_again()(self._send, path, self.key(f"{name}/{names[-1]}"))
            body = json.dumps({"result": result, "files": names}).encode()
            key = self.key(f"{name}/{DONE}")
            asking_again()(self.client.put_object, Bucket=self.bucket, Key=key, Body=body)
        write_mark(folder, result)

    def _send(self, path: Path, key: str) -> None:
        with path.open("rb") as file:
            upload(self.client, self.bucket, key, file)

    def fetch(self, name: str) -> Path:
        """As in `Store`."""
        folder = self.cache / name
        if read_mark(folder) is not None:
            return folder
        mark = self._mark(name)
        if mark is None:
            raise StoreError(f"{self.uri}/{name} is not finished: run the stage that makes it")
        clear(folder)
        with self.reaching("read"):
            for relative in mark["files"]:
                target = folder / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                key = self.key(f"{name}/{relative}")
                asking_again()(self.client.download_file, self.bucket, key, str(target))
        write_mark(folder, mark["result"])
        return folder

    def files(self, name: str) -> Files:
        """As in `Store`."""
        return S3Files(f"{self.uri}/{name}", endpoint=self._endpoint, cache=self._shared_cache)

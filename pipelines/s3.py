"""The store on S3: what `pipelines.store` promises, with boto3 and a local copy."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.store import DONE, StoreError, clear, files_below, read_mark

if TYPE_CHECKING:
    from pathlib import Path


class S3Store:
    """`s3://bucket/prefix`. Folders are built and read in a local copy below `cache`."""

    def __init__(self, uri: str, cache: Path, endpoint: str | None = None) -> None:
        import boto3
        from botocore.config import Config

        parts = urlsplit(uri)
        self.uri = uri.rstrip("/")
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        digest = hashlib.sha256(f"{endpoint}{self.uri}".encode()).hexdigest()[:12]
        self.cache = cache.expanduser() / digest
        # Standard mode retries throttling and broken connections with back-off.
        config = Config(retries={"mode": "standard", "max_attempts": 6}, connect_timeout=5)
        self.client = boto3.client("s3", endpoint_url=endpoint, config=config)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def check(self) -> None:
        """As in `Store`."""
        key = self._key(".probe")
        try:
            self.client.put_object(Bucket=self.bucket, Key=key, Body=b"")
            self.client.delete_object(Bucket=self.bucket, Key=key)
        except Exception as error:
            raise StoreError(
                f"store {self.uri} cannot be written ({error}): check that the bucket exists, the "
                "credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) may write to it, and "
                "SDN_S3_ENDPOINT names the server"
            ) from error

    def done(self, name: str) -> dict[str, Any] | None:
        """As in `Store`."""
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=self._key(f"{name}/{DONE}"))
        except self.client.exceptions.NoSuchKey:
            return None
        mark: dict[str, Any] = json.loads(answer["Body"].read())["result"]
        return mark

    def workspace(self, name: str) -> Path:
        """As in `Store`."""
        folder = self.cache / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def publish(self, name: str, result: dict[str, Any]) -> None:
        """As in `Store`: files with checksums first, then the mark that lists them."""
        folder = self.cache / name
        names = []
        for path in files_below(folder):
            names.append(str(path.relative_to(folder)))
            self.client.upload_file(
                str(path),
                self.bucket,
                self._key(f"{name}/{names[-1]}"),
                ExtraArgs={"ChecksumAlgorithm": "SHA256"},
            )
        body = json.dumps({"result": result, "files": names}).encode()
        self.client.put_object(Bucket=self.bucket, Key=self._key(f"{name}/{DONE}"), Body=body)
        self._complete(folder, result)

    def fetch(self, name: str) -> Path:
        """As in `Store`."""
        folder = self.cache / name
        if read_mark(folder) is not None:
            return folder
        if self.done(name) is None:
            raise StoreError(f"{self.uri}/{name} is not finished: run the stage that makes it")
        answer = self.client.get_object(Bucket=self.bucket, Key=self._key(f"{name}/{DONE}"))
        mark = json.loads(answer["Body"].read())
        clear(folder)
        for relative in mark["files"]:
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            self.client.download_file(self.bucket, self._key(f"{name}/{relative}"), str(target))
        self._complete(folder, mark["result"])
        return folder

    def list(self, name: str) -> list[str]:
        """As in `Store`."""
        prefix = self._key(name) + "/"
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=prefix, Delimiter="/"
        )
        return sorted(
            found["Prefix"][len(prefix) : -1]
            for page in pages
            for found in page.get("CommonPrefixes", ())
        )

    @staticmethod
    def _complete(folder: Path, result: dict[str, Any]) -> None:
        from pipelines.store import write_mark

        write_mark(folder, result)

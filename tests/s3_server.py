"""A real S3 server (SeaweedFS) on 127.0.0.1, started and ended by the tests that need one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import psutil
from botocore.exceptions import BotoCoreError, ClientError

WEED = str(Path(sys.executable).with_name("weed"))
ACTIONS = ["Read", "Write", "List", "Tagging"]
BUCKET = "data"


@dataclass(frozen=True)
class S3Server:
    """Where it is, and an owner's client; the bucket `data` is there."""

    endpoint: str
    client: object
    secret: str

    def keys(self, access: str = "key", secret: str | None = None) -> dict[str, str]:
        """Environment of somebody who may use the bucket; `reader` may only read."""
        return {
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": self.secret if secret is None else secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "SDN_S3_ENDPOINT": self.endpoint,
        }


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(folder: Path, cores: list[int] | None = None, secret: str = "secret"):
    """The server, with its data below `folder`; ended, with all it started, by its id.

    Args:
        folder: of its configuration, data and log.
        cores: on which it runs; none or None leaves it those of this process.
        secret: of all whom it knows.
    """
    identities = [
        _identity("owner", "owner", secret, ["Admin", *ACTIONS]),
        _identity("user", "key", secret, [f"{action}:{BUCKET}" for action in ACTIONS]),
        _identity("reader", "reader", secret, [f"Read:{BUCKET}", f"List:{BUCKET}"]),
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "volumes").mkdir()
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    names = ("master", "volume", "filer")
    others = [f"-{name}.port={free_port()}" for name in names]
    grpc = [f"-{name}.port.grpc={free_port()}" for name in (*names, "s3")]
    command = (
        WEED, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'volumes'}",
        "-s3", f"-s3.port={port}", f"-s3.config={folder / 's3.json'}", *others, *grpc,
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
    )  # fmt: skip
    log = folder / "weed.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
    if cores:
        psutil.Process(process.pid).cpu_affinity(cores)
    try:
        yield S3Server(endpoint, _ready(endpoint, secret, log), secret)
    finally:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for part in tree:  # its data is not kept, and it takes its time to end by itself
            part.kill()
        psutil.wait_procs(tree, timeout=20)


def _ready(endpoint: str, secret: str, log: Path) -> object:
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="owner",
        aws_secret_access_key=secret,
    )
    deadline = time.monotonic() + 90
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="probe", Body=b"")
        except (BotoCoreError, ClientError):
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        else:
            return client


def _identity(name: str, key: str, secret: str, actions: list[str]) -> dict[str, object]:
    """One of those whom the server knows."""
    credentials = [{"accessKey": key, "secretKey": secret}]
    return {"name": name, "credentials": credentials, "actions": actions}

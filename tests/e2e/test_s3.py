"""The whole chain on S3: a real server (SeaweedFS) on 127.0.0.1, started by the test itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import s3_server
from gate import Gate
from places import place


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A place whose environment names a running S3 server with the bucket `data`."""
    folder = tmp_path_factory.mktemp("s3")
    here = place(folder)
    with s3_server.running(folder) as found:
        here.env.update(found.keys(), SDN_CACHE=str(folder / "cache"))
        yield here, found.client


def sdn(here, *args: str) -> subprocess.CompletedProcess[str]:
    """A command that must succeed."""
    here.store.parent.mkdir(exist_ok=True)
    done = here.sdn(*args)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@contextmanager
def away(here, client, prefix, seconds):
    """The server is away for so long as soon as stage one trains; what was seen of it meanwhile."""
    endpoint = urlsplit(here.env["SDN_S3_ENDPOINT"])
    happened = []

    def happen(gate):
        until = time.monotonic() + 300
        while time.monotonic() < until:
            found = client.list_objects_v2(Bucket="data", Prefix=f"{prefix}/training/stage_one")
            if any("/points/" in one["Key"] for one in found.get("Contents", ())):
                gate.shut()
                time.sleep(seconds)
                gate.open()
                happened.append(seconds)
                return
            time.sleep(0.1)

    with Gate(endpoint.port) as gate:
        thread = threading.Thread(target=happen, args=(gate,), daemon=True)
        thread.start()
        env = here.env | {"SDN_S3_ENDPOINT": f"http://127.0.0.1:{gate.port}"}
        yield type(here)(store=here.store, env=env), happened
        thread.join(timeout=seconds + 5)


def answer_of(done: subprocess.CompletedProcess[str]):
    """The JSON object in the last line."""
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.rest
def test_a_run_in_a_bucket(server):
    """Every stage lies in the bucket, though the server was away while one trained; a machine
    without the local copies finds all of it done.
    """
    here, client = server
    run = ("run", "tiny", "--store", "s3://data/runs", "--json", "--set", "search.trials=0")
    with away(here, client, "runs", 15) as (there, happened):
        first = answer_of(sdn(there, *run))
    assert happened == [15]
    assert all(stage["fresh"] for stage in first["stages"].values())
    for stage in first["stages"].values():
        client.head_object(Bucket="data", Key=f"runs/{stage['folder']}/done.json")
    cache = Path(here.env["SDN_CACHE"])
    for copies in cache.glob("*/stages"):
        shutil.rmtree(copies)
    second = answer_of(sdn(here, *run))
    assert second["nothing_to_do"]
    assert second["scores"] == first["scores"]
    assert second["model"]["version"] == first["model"]["version"]
    drawn = answer_of(sdn(here, "generate", "man cook", "--store", "s3://data/runs", "--json"))
    assert Path(here.store.parent / drawn["images"][0]).is_file()


@pytest.mark.rest
def test_a_bucket_that_is_gone_for_a_minute(server):
    """The run goes on as if nothing had been, and every sample was consumed once."""
    here, client = server
    place = "s3://data/minute"
    changes = ("--set", "stage_one.epochs=40", "--set", "search.trials=0")
    with away(here, client, "minute", 60) as (there, happened):
        done = answer_of(sdn(there, "run", "tiny", "--store", place, "--json", *changes))
    assert happened == [60]
    assert all(stage["fresh"] for stage in done["stages"].values())
    sdn(here, "ledger", "--store", place)


@pytest.mark.rest
def test_a_data_set_in_a_bucket_is_verified(server):
    """`prepare` writes it, `verify` reads every byte, and a changed object is found by name."""
    here, client = server
    sdn(here, "prepare", "openmoji", "--out", "s3://data/set", "--set", "resolution=32",
        "--set", "limit=50")  # fmt: skip
    sdn(here, "verify", "s3://data/set")
    listed = client.list_objects_v2(Bucket="data", Prefix="set/")["Contents"]
    name = next(found["Key"] for found in listed if found["Key"].endswith(".tar"))
    whole = client.get_object(Bucket="data", Key=name)["Body"].read()
    client.put_object(Bucket="data", Key=name, Body=whole[:700] + b"?" + whole[701:])
    done = here.sdn("verify", "s3://data/set")
    assert done.returncode == 1
    assert Path(name).name in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("store", "changes"),
    [
        ("s3://nobucket/runs", {}),
        ("s3://data/runs", {"AWS_SECRET_ACCESS_KEY": "wrong"}),
        ("s3://data/runs", {"SDN_S3_ENDPOINT": "http://127.0.0.1:9"}),
    ],
    ids=["no bucket", "wrong secret", "no server"],
)
def test_a_store_that_cannot_be_written(server, store, changes):
    """A missing bucket, a wrong secret and a silent server are named before any work."""
    here, _ = server
    env = here.env | changes
    done = type(here)(store=here.store, env=env).sdn("run", "tiny", "--store", store, timeout=120)
    assert done.returncode == 1
    assert f"store {store} cannot be written" in done.stderr
    assert "SDN_S3_ENDPOINT" in done.stderr
    assert "Traceback" not in done.stderr

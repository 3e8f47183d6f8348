"""The commands of `infra/compose.yaml` as processes, and a pipeline on them that loses a node.

Postgres, SeaweedFS, MLflow, Prefect with a worker and a reconciler, a Ray head and a node beside
it, each with credentials that must not come to light anywhere. Commands, environments and health
checks are read from the file; only addresses and folders are this machine's. For want of machines
the head takes a rank here, and the worker's flows run on the head's node.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import infra_files
import postgres_server
import psutil
import pytest
from places import COMMAND, ROOT, background, free_port, place

from pipelines.prefect_api import PrefectApi
from pipelines.s3_files import S3Files
from sdn.ledger import attempts_of

pytestmark = [pytest.mark.rest, pytest.mark.timeout(1800)]
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
USER = "someone"
BUCKET = "sdn"
LISTENING = {"s3": 8333, "mlflow": 5000, "prefect": 4200, "ray-head": 6379, "dashboard": 8265}
"""Ports in the file; those of this machine stand in for them."""


@dataclass(frozen=True)
class Planted:
    """Credentials that nothing may show."""

    auth: str
    s3: str
    database: str
    ray: str

    @classmethod
    def new(cls):
        return cls(*(f"planted{name}{secrets.token_hex(16)}" for name in ("a", "s", "d", "r")))

    def seen_in(self, text):
        return [name for name, value in vars(self).items() if value in text]


class Composed:
    """The services of the file, at addresses and in folders of this machine."""

    def __init__(self, planted: Planted, token: Path, database: int, folder: Path) -> None:
        self.ports = {name: free_port() for name in LISTENING}
        given = {
            "SDN_AUTH": f"{USER}:{planted.auth}",
            "AWS_ACCESS_KEY_ID": "owner",
            "AWS_SECRET_ACCESS_KEY": planted.s3,
            "SDN_POSTGRES_PASSWORD": planted.database,
            "SDN_RAY_TOKEN_FILE": str(token),
            "SDN_WORKER_CPUS": "1",
        }
        self._instead = {
            "postgres:5432": f"127.0.0.1:{database}",
            "/var/lib/sdn/s3": str(folder / "s3"),
            "/run/secrets/ray_token": str(token),
            "0.0.0.0": "127.0.0.1",
        }
        for name, port in LISTENING.items():
            host = "ray-head" if name == "dashboard" else name
            for before in (f"{host}:{port}", f"127.0.0.1:{port}"):
                self._instead[before] = f"127.0.0.1:{self.ports[name]}"
        self._services: dict[str, Any] = infra_files.compose(given)["services"]

    def _here(self, text: str) -> str:
        by_port = {str(port): str(self.ports[name]) for name, port in LISTENING.items()}
        # At once: what was put in is not looked at again.
        known = "|".join(map(re.escape, self._instead))
        text = re.sub(rf"({known})(?!\d)", lambda match: self._instead[match[1]], text)
        return by_port.get(text, text)

    def command(self, name: str) -> list[str]:
        """What the container runs, which is the image's entrypoint `sdn` and these words."""
        return [COMMAND, *(self._here(word) for word in self._services[name]["command"])]

    def env(self, name: str) -> dict[str, str]:
        """What is set in the container."""
        found = self._services[name].get("environment", {})
        return {key: self._here(str(value)) for key, value in found.items()}

    def health_check(self, name: str) -> list[str]:
        """How the engine finds out whether it is well."""
        _, program, *words = self._services[name]["healthcheck"]["test"]
        assert program == "python"
        return [sys.executable, *(self._here(word) for word in words)]


@dataclass(frozen=True)
class Parts:
    """Where everything is."""

    folder: Path
    """With a log for each process."""
    ray_folder: Path
    env: dict[str, str]
    """Of the worker, and of those who use the parts as it does."""
    planted: Planted
    database: postgres_server.Postgres
    node: subprocess.Popen
    """The second node of the Ray cluster."""
    api: PrefectApi
    s3: Any
    """An owner's client."""

    @property
    def login(self):
        return (USER, self.planted.auth)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def trees(self):
        """Command lines of all processes of the parts."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = "\0".join(process.info["cmdline"] or [])
            if str(self.folder) in line or str(self.ray_folder) in line or str(ROOT) in line:
                found.append(line)
        return found


class Machine:
    """Starts services of the file as processes, and ends them."""

    def __init__(self, stack: contextlib.ExitStack, composed: Composed, folder: Path) -> None:
        self._stack, self._composed, self._folder = stack, composed, folder
        self._env = place(folder).env | {"SDN_CACHE": str(folder / "cache")}

    def env(self, name: str, **more: str) -> dict[str, str]:
        return self._env | self._composed.env(name) | more

    def start(self, name: str, *more: str, **env: str) -> subprocess.Popen:
        command = (*self._composed.command(name), *more)
        log = self._folder / f"{name}.log"
        return self._stack.enter_context(background(*command, env=self.env(name, **env), log=log))

    def start_ray(self, name: str, *more: str) -> subprocess.Popen:
        """Ray gives a node half a minute to start, which a busy machine may not keep."""
        log = self._folder / f"{name}.log"
        for _ in range(3):
            process = self.start(name, *more)
            while process.poll() is None:
                if "Ray runtime started" in log.read_text():
                    return process
                time.sleep(0.5)
        raise AssertionError(log.read_text()[-3000:])

    def once(self, name: str) -> None:
        """A service that does its work and ends."""
        done = subprocess.run(
            self._composed.command(name), env=self.env(name), cwd=ROOT, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        (self._folder / f"{name}.log").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stdout + done.stderr

    def wait(self, name: str, process: subprocess.Popen) -> None:
        """Ask as the engine does, until it is well."""
        until = time.monotonic() + 300
        while True:
            asked = subprocess.run(
                self._composed.health_check(name), env=self.env(name), cwd=ROOT, check=False,
                capture_output=True, text=True,
            )  # fmt: skip
            if asked.returncode == 0:
                return
            said = asked.stderr + (self._folder / f"{name}.log").read_text()[-3000:]
            assert process.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Everything started, deployed and healthy."""
    postgres_server.require()
    folder, planted = tmp_path_factory.mktemp("cluster"), Planted.new()
    token = tmp_path_factory.mktemp("secrets") / "ray-token"
    token.write_text(planted.ray)
    token.chmod(0o600)
    # Ray's sockets lie there, and their paths may have 107 characters.
    ray_folder = Path(tempfile.mkdtemp(prefix="sdn-r-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, ray_folder, ignore_errors=True)
        database = stack.enter_context(postgres_server.running(planted.database))
        for name in ("mlflow", "prefect"):
            database.make(name)
        composed = Composed(planted, token, database.port, folder)
        machine = Machine(stack, composed, folder)
        stack.callback(end_ray, ray_folder)
        # Two nodes, not the four of the file: the head has a core here.
        head = machine.start_ray("ray-head", "--cpus", "1", "--folder", str(ray_folder))
        started = {name: machine.start(name) for name in ("s3", "mlflow", "prefect")}
        machine.wait("ray-head", head)
        node = machine.start_ray("ray-worker")
        for name, process in started.items():
            machine.wait(name, process)
        machine.once("deploy")
        # `auto` would be whatever cluster this machine has.
        address = {"SDN_RAY_ADDRESS": f"127.0.0.1:{composed.ports['ray-head']}"}
        last = {"worker": machine.start("worker", **address)}
        last["reconciler"] = machine.start("reconciler")
        for name, process in last.items():
            machine.wait(name, process)
        env = machine.env("worker", **address)
        client = boto3.client(
            "s3", endpoint_url=env["SDN_S3_ENDPOINT"], region_name="us-east-1",
            aws_access_key_id="owner", aws_secret_access_key=planted.s3,
        )  # fmt: skip
        api = stack.enter_context(PrefectApi(env["PREFECT_API_URL"], (USER, planted.auth)))
        yield Parts(
            folder=folder, ray_folder=ray_folder, env=env, planted=planted, database=database,
            node=node, api=api, s3=client,
        )  # fmt: skip


def end_ray(folder):
    """End those of Ray's processes that are no children of what was started."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def kill_tree(process):
    """SIGKILL of a process and all that it started, as when a machine goes away."""
    for part in [
        *psutil.Process(process.pid).children(recursive=True),
        psutil.Process(process.pid),
    ]:
        with contextlib.suppress(psutil.NoSuchProcess):
            part.kill()
    process.wait()


CHANGES = (
    "search.trials=0", "workers=1", "max_workers=2", "teacher.epochs=1", "captions.epochs=1",
    "stage_one.epochs=1", "stage_two.epochs=40",
)  # fmt: skip


@pytest.fixture(scope="module")
def survived(parts):
    """A run of the pipeline in whose second stage the second node is killed; (id, lines, s)."""
    named = {"deployments": {"name": {"any_": ["sdn-pipeline"]}}}
    (found,) = parts.api.ask("POST", "deployments/filter", named)
    parameters = {"recipe": "tiny", "changes": list(CHANGES)}
    path = f"deployments/{found['id']}/create_flow_run"
    run = parts.api.ask("POST", path, {"parameters": parameters})["id"]
    began = time.monotonic()

    def state():
        return parts.api.ask("GET", f"flow_runs/{run}")["state"]["type"]

    def wait(what, check, seconds):
        until = time.monotonic() + seconds
        while not (got := check()):
            assert state() not in FINAL or what == "end", parts.log("worker")[-4000:]
            assert time.monotonic() < until, (what, parts.log("worker")[-4000:])
            time.sleep(0.5)
        return got

    names = wait("two ranks train stage two", lambda: trained_by_two(parts), 900)
    lines = parts.trees()
    killed = time.monotonic()
    kill_tree(parts.node)
    wait("end", lambda: state() in FINAL, 900)
    assert state() == "COMPLETED", parts.log("worker")[-6000:]
    print(f"\nnode killed after {killed - began:.0f} s, end after {time.monotonic() - began:.0f} s")
    return run, lines, names


def objects(parts, prefix=""):
    """All that lies in the bucket: (key, content)."""
    pages = parts.s3.get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=BUCKET, Prefix=prefix):
        for one in page.get("Contents", []):
            body = parts.s3.get_object(Bucket=BUCKET, Key=one["Key"])["Body"]
            yield one["Key"], body.read()


def training_of(parts, stage):
    """The place of a stage's training; None before there is one."""
    listed = parts.s3.list_objects_v2(
        Bucket=BUCKET, Prefix=f"runs/training/{stage}", MaxKeys=1
    ).get("Contents")
    if not listed:
        return None
    name = listed[0]["Key"].split("/")[2]
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            patch.setenv(variable, parts.env[variable])
        endpoint = parts.env["SDN_S3_ENDPOINT"]
        files = S3Files(f"s3://{BUCKET}/runs/training/{name}", endpoint=endpoint)
        assert files.client
    return files


def trained_by_two(parts):
    """Whether two ranks of stage two have written their first points."""
    files = training_of(parts, "stage_two")
    if files is None:
        return False
    worlds = [attempt.world for attempt in attempts_of(files)]
    return 2 in worlds and any(files.walk("points"))


def test_the_pipeline_outlives_a_node(parts, survived):
    """One of two Ray nodes is killed in stage two: the run completes, on the one that is left."""
    files = training_of(parts, "stage_two")
    worlds = [attempt.world for attempt in attempts_of(files)]
    assert worlds[0] == 2
    assert worlds[-1] == 1
    mark = json.loads(dict(objects(parts, "runs/stages/stage_two"))[done_key(parts)])
    ledger = mark["result"]["result"]["ledger"]
    print(worlds, ledger)
    assert (ledger["lost"], ledger["twice"]) == (0, 0)
    # Ranks that cannot be heard would be taken for hung, and killed, after SDN_STALL_S.
    said = "".join(p.read_text() for p in parts.ray_folder.rglob("job-driver-stage_two*.log"))
    assert "attempt failed and is repeated" in said
    assert "reports is gone" not in said


def done_key(parts):
    (found,) = [k for k, _ in objects(parts, "runs/stages/stage_two") if k.endswith("/done.json")]
    return found


def test_the_model_is_registered(parts, survived):
    """MLflow on Postgres has the version, its files in the bucket, and Prefect its artifacts."""
    answer = httpx.get(
        f"{parts.env['SDN_TRACKING_URI']}/api/2.0/mlflow/registered-models/alias",
        params={"name": "sdn-tiny", "alias": "champion"}, auth=parts.login, timeout=30,
    )  # fmt: skip
    assert answer.is_success, answer.text
    assert answer.json()["model_version"]["version"] == "1"
    assert any(key.startswith("mlflow/") for key, _ in objects(parts, "mlflow/"))
    run, _, _ = survived
    artifacts = parts.api.ask("POST", "artifacts/filter", {})
    mine = {one["key"] for one in artifacts if one["flow_run_id"] == run}
    assert {"resolved-config", "result"} <= mine


def test_no_credential_comes_to_light(parts, survived):
    """Logs, command lines, databases, bucket and what `sdn doctor` says show none of them."""
    _, lines, _ = survived
    doctor = subprocess.run(
        [COMMAND, "doctor", "--json"], env=parts.env, cwd=parts.folder, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert '"MLflow"' in doctor.stdout
    texts = {"doctor": doctor.stdout + doctor.stderr, "command lines": "\n".join(lines)}
    texts["databases"] = parts.database.dump()
    texts["postgres"] = (parts.database.folder / "postgres.log").read_text()
    for folder in (parts.folder, parts.ray_folder):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                texts[str(path)] = path.read_bytes().decode(errors="replace")
    texts |= {key: content.decode(errors="replace") for key, content in objects(parts)}
    assert len(texts) > 50
    assert any(path.endswith("ray-head.log") for path in texts)
    found = {where: seen for where, text in texts.items() if (seen := parts.planted.seen_in(text))}
    assert found == {}

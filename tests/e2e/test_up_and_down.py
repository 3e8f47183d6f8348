"""A whole stack on free ports: up, killed part by part, up again with its data, down for good.

The tests share one stack and follow each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import pytest
from places import COMMAND, place

from pipelines.marks import marked
from pipelines.ports import free_ports, listens

pytestmark = pytest.mark.timeout(1200)

USER, PASSWORD = "anna", "planted-0123456789abcdef"
PARTS = ("s3", "mlflow", "prefect", "worker", "reconciler")


@dataclass
class Running:
    """A stack and how to ask for it."""

    root: Path
    env: dict[str, str]
    ports: dict[str, int]

    @property
    def folder(self) -> Path:
        return self.root / "stack"

    @property
    def options(self) -> list[str]:
        return [f"--{name}-port={port}" for name, port in self.ports.items()]

    @property
    def client(self) -> dict[str, str]:
        """What `env.sh` exports."""
        script = f". {self.folder / 'env.sh'} && env -0"
        done = subprocess.run(
            ["sh", "-c", script], env={"PATH": os.environ["PATH"]},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)

    def sdn(self, *args: str, ok: int = 0, env: dict[str, str] | None = None) -> str:
        """What a command says, on both channels."""
        done = subprocess.run(
            [COMMAND, *args], env=self.env | (env or {}), cwd=self.root.parent,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == ok, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout

    def up(self, ok: int = 0) -> str:
        return self.sdn("up", "--store", str(self.root), "--detach", *self.options, ok=ok)

    def status(self) -> dict[str, Any]:
        done = subprocess.run(
            [COMMAND, "status", "--store", str(self.root), "--json"],
            env=self.env, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert done.returncode == (0 if found["healthy"] else 1)
        return found

    def pids(self) -> dict[str, int]:
        return {part["name"]: part["pid"] for part in self.status()["parts"]}

    def wait_healthy(self, changed: str, before: int) -> dict[str, Any]:
        """The state once all is healthy, and a part has another process."""
        until = time.monotonic() + 300
        while True:
            found = self.status()
            pid = next(part["pid"] for part in found["parts"] if part["name"] == changed)
            if found["healthy"] and pid != before:
                return found
            assert time.monotonic() < until, found
            time.sleep(0.3)

    def api(
        self, method: str, path: str, content: Any = None, login: Any = (USER, PASSWORD)
    ) -> Any:
        url = f"http://127.0.0.1:{self.ports['prefect']}/api/{path}"
        return httpx.request(method, url, json=content, auth=login, timeout=30)

    def mlflow(self, path: str, content: Any, login: Any = (USER, PASSWORD)) -> Any:
        url = f"http://127.0.0.1:{self.ports['mlflow']}/api/2.0/mlflow/{path}"
        return httpx.post(url, json=content, auth=login, timeout=30)

    def s3(self) -> Any:
        env = self.client
        return boto3.client(
            "s3", endpoint_url=env["SDN_S3_ENDPOINT"], region_name="us-east-1",
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Up, and how long that took; ended whatever happens."""
    folder = tmp_path_factory.mktemp("up")
    ports = dict(zip(("s3", "mlflow", "prefect"), free_ports(3), strict=True))
    env = place(folder).env | {"SDN_AUTH": f"{USER}:{PASSWORD}"}
    found = Running(root=folder / "runs", env=env, ports=ports)
    try:
        began = time.monotonic()
        said = found.up()
        print(f"\nup after {time.monotonic() - began:.1f} s\n{said}")
        yield found
    finally:
        for one in marked(found.folder):
            with contextlib.suppress(psutil.Error):
                one.process.kill()


def test_up_makes_all_that_flows_need(stack):
    """Every part is healthy; bucket, pool, limits and all deployments are there."""
    found = stack.status()
    assert found["healthy"]
    assert {part["name"]: part["state"] for part in found["parts"]} == dict.fromkeys(
        PARTS, "healthy"
    )
    print(f"\n{found['memory_mib']} MiB: {[(p['name'], p['memory_mib']) for p in found['parts']]}")
    assert found["memory_mib"] < 1800
    assert [one["Name"] for one in stack.s3().list_buckets()["Buckets"]] == ["sdn"]
    pool = stack.api("GET", "work_pools/sdn").json()
    assert (pool["type"], pool["concurrency_limit"]) == ("process", 4)
    queues = stack.api("POST", "work_pools/sdn/queues/filter", {}).json()
    limits = {one["name"]: one["concurrency_limit"] for one in queues}
    assert limits == {"default": None, "training": 1}
    there = {one["name"] for one in stack.api("POST", "deployments/filter", {}).json()}
    assert {"sdn-pipeline", "sdn-rollback"} <= there


def test_up_and_deploy_again_change_nothing(stack):
    """What runs goes on with the same processes, and no deployment is touched."""

    def deployments():
        found = stack.api("POST", "deployments/filter", {}).json()
        return {one["id"]: (one["name"], one["updated"]) for one in found}

    pids, before = stack.pids(), deployments()
    assert "runs already, and all of it is healthy" in stack.up()
    assert "nothing to do" in stack.sdn("deploy", env=stack.client)
    assert stack.pids() == pids
    assert deployments() == before


def test_servers_ask_for_the_login(stack):
    """Without it, or with another one, nothing is answered; health is open."""
    for login in (None, (USER, "another-password")):
        assert stack.api("GET", "work_pools/sdn", login=login).status_code == 401
        assert stack.mlflow("experiments/search", {"max_results": 1}, login).status_code == 401
    assert stack.api("GET", "health", login=None).is_success
    said = stack.sdn("deploy", ok=1, env=stack.client | {"SDN_AUTH": f"{USER}:another-password"})
    assert "asks for a login, and another one came" in said


def test_another_stack_does_not_take_the_ports(stack, tmp_path):
    """It is told whose they are and how to end that, and starts nothing."""
    other = Running(root=tmp_path / "runs", env=stack.env, ports=stack.ports)
    said = other.up(ok=1)
    assert f"port {stack.ports['s3']} for S3 is in use by weed" in said
    assert f"SDN_STACK={stack.folder} sdn down" in said
    assert marked(other.folder) == []
    free = Running(root=stack.root, env=stack.env, ports=dict(stack.ports, s3=free_ports(1)[0]))
    assert "runs with other ports or parts: `sdn down` first" in free.up(ok=1)


def test_a_killed_part_is_started_again_with_its_data(stack):
    """`kill -9` of each one after another: it comes back, and what was written is there."""
    stack.s3().put_object(Bucket="sdn", Key="probe", Body=b"kept")
    made = stack.mlflow("experiments/create", {"name": "kept"}).json()
    stack.mlflow("runs/create", {"experiment_id": made["experiment_id"], "run_name": "kept"})
    flow = stack.api("POST", "flows/", {"name": "kept"}).json()["id"]
    stack.api("POST", "flow_runs/", {"name": "kept", "flow_id": flow}).raise_for_status()
    for part in PARTS:
        pid = stack.pids()[part]
        os.kill(pid, signal.SIGKILL)
        found = stack.wait_healthy(part, pid)
        assert {one["name"] for one in found["parts"]} == set(PARTS)
    assert_data(stack)


def test_a_stack_whose_supervisor_was_killed_is_put_right(stack, tmp_path):
    """It is told; `sdn up` ends what is left, keeps the data, and `sdn down` ends both."""
    (supervisor,) = [one for one in marked(stack.folder) if one.part == "supervisor"]
    supervisor.process.kill()
    psutil.wait_procs([supervisor.process], timeout=10)
    said = stack.sdn("status", "--store", str(stack.root), ok=1)
    assert "`sdn up` puts it right" in said
    log = tmp_path / "up.log"
    with log.open("w") as out:
        up = subprocess.Popen(
            [COMMAND, "up", "--store", str(stack.root)], env=stack.env, stdout=out, stderr=out
        )
    until = time.monotonic() + 300
    while "Ctrl-C ends all of it" not in log.read_text():
        assert up.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)
    assert "the supervisor of an earlier stack is gone" in log.read_text()
    assert stack.status()["healthy"]
    assert_data(stack)
    assert_no_secret_is_shown(stack)
    assert "has ended" in stack.sdn("down", "--store", str(stack.root))
    assert up.wait(60) == 0
    assert "ended by another command" in log.read_text()


def test_after_down_nothing_is_left(stack):
    """No process carries the mark, no port is listened on, no socket's file lies anywhere."""
    assert marked(stack.folder) == []
    assert not [port for port in stack.ports.values() if listens(port)]
    sockets = [p for p in stack.root.rglob("*") if stat.S_ISSOCK(p.lstat().st_mode)]
    assert sockets == []
    listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
    assert not listening & set(stack.ports.values())
    assert "no process" in stack.sdn("down", "--store", str(stack.root))
    said = stack.sdn("status", "--store", str(stack.root), ok=1)
    assert "does not run" in said


def test_ctrl_c_ends_a_half_started_stack(stack, tmp_path):
    """While it waits for its parts, too."""
    log = tmp_path / "up.log"
    with log.open("w") as out:
        up = subprocess.Popen(
            [COMMAND, "up", "--store", str(stack.root)],
            env=stack.env, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    until = time.monotonic() + 60
    while len({one.part for one in marked(stack.folder)}) < 4:
        assert up.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    up.send_signal(signal.SIGINT)
    assert up.wait(60) != 0
    assert marked(stack.folder) == [], log.read_text()


def assert_data(stack):
    body = stack.s3().get_object(Bucket="sdn", Key="probe")["Body"].read()
    assert body == b"kept"
    found = stack.mlflow("experiments/search", {"max_results": 9, "filter": "name = 'kept'"}).json()
    ids = [one["experiment_id"] for one in found["experiments"]]
    (run,) = stack.mlflow("runs/search", {"experiment_ids": ids}).json()["runs"]
    assert run["info"]["run_name"] == "kept"
    runs = stack.api("POST", "flow_runs/filter", {"flow_runs": {"name": {"any_": ["kept"]}}}).json()
    assert len(runs) == 1


def assert_no_secret_is_shown(stack):
    """In no log, no command line, and no file that others may read."""
    env = stack.client
    secrets = (PASSWORD, env["AWS_SECRET_ACCESS_KEY"])
    files = [path for path in stack.root.rglob("*") if path.is_file()]
    logs = [path for path in files if path.parent.name == "logs"]
    assert len(logs) >= len(PARTS)
    holding = [
        path
        for path in files
        if any(secret.encode() in path.read_bytes() for secret in secrets)
        and (path in logs or stat.S_IMODE(path.stat().st_mode) != 0o600)
    ]
    assert holding == []
    for one in psutil.process_iter(["cmdline"]):
        assert not any(secret in " ".join(one.info["cmdline"] or []) for secret in secrets)

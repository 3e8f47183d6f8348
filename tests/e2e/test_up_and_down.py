"""A whole stack on free ports: up, killed part by part, up again with its data, down for good.

The tests share one stack and follow each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import pytest
from botocore.config import Config
from places import COMMAND, place

from pipelines.marks import marked
from pipelines.ports import free_ports
from pipelines.s3_patience import ATTEMPTS
from pipelines.stack import Stack

pytestmark = pytest.mark.timeout(1200)

USER, PASSWORD = "anna", "planted-0123456789abcdef"
PARTS = ("s3", "mlflow", "prefect", "worker", "reconciler")


@dataclass
class Running:
    """A stack and how to ask for it."""

    root: Path
    env: dict[str, str]
    ports: dict[str, int]
    listening: tuple[set[int], set[Path]] = field(default=(set(), set()))
    """Before it was ended, see `listening`."""
    said: str = ""
    """By the command that started it."""

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

    def sdn(
        self, *args: str, ok: int = 0, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """What a command says, on both channels."""
        done = subprocess.run(
            [COMMAND, *args], env=self.env | (env or {}), cwd=cwd or self.root.parent,
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
            # As often as the pipeline asks: a server that has just started may say InternalError.
            config=Config(retries={"mode": "standard", "total_max_attempts": ATTEMPTS}),
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
        found.said = found.up()
        print(f"\nup after {time.monotonic() - began:.1f} s\n{found.said}")
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
    assert found["memory_mib"] * 2**20 < 1.8e9
    pages = ("S3", "MLflow: runs and models", "Prefect: start and watch flows")
    for port, page in zip(stack.ports.values(), pages, strict=True):
        assert f"http://127.0.0.1:{port}  {page}" in stack.said
    assert str(stack.folder / "env.sh") in stack.said
    assert [one["Name"] for one in stack.s3().list_buckets()["Buckets"]] == ["sdn"]
    pool = stack.api("GET", "work_pools/sdn").json()
    assert (pool["type"], pool["concurrency_limit"]) == ("process", 4)
    queues = stack.api("POST", "work_pools/sdn/queues/filter", {}).json()
    limits = {one["name"]: one["concurrency_limit"] for one in queues}
    assert limits == {"default": None, "training": 1}
    there = {one["name"] for one in stack.api("POST", "deployments/filter", {}).json()}
    assert {"sdn-pipeline", "sdn-rollback"} <= there
    # What sends messages comes after the start, which it would make longer.
    until = time.monotonic() + 120
    while "slack-webhook" not in (blocks := _slugs(stack)):
        assert time.monotonic() < until, blocks
        time.sleep(0.5)


def test_all_of_it_listens_on_this_machine_alone(stack):
    """Every port that any of its processes has open, SeaweedFS's own among them."""
    found = [at.laddr for at in connections(stack) if at.status == psutil.CONN_LISTEN]
    assert {at.port for at in found} > set(stack.ports.values())
    assert {at.ip for at in found} == {"127.0.0.1"}


def _slugs(stack):
    return {one["slug"] for one in stack.api("POST", "block_types/filter", {}).json()}


def test_up_and_deploy_again_change_nothing(stack):
    """What runs goes on with the same processes, and no deployment is touched."""

    def deployments():
        found = stack.api("POST", "deployments/filter", {}).json()
        return {one["id"]: (one["name"], one["updated"]) for one in found}

    pids, before = stack.pids(), deployments()
    assert "runs already, and all of it is healthy" in stack.up()
    # In the folder in which the stack has deployed: flow runs begin where that was done.
    assert "nothing to do" in stack.sdn("deploy", env=stack.client, cwd=stack.folder)
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


@pytest.fixture(scope="module")
def kept(stack):
    """The stack, with something to lose in each server."""
    stack.s3().put_object(Bucket="sdn", Key="probe", Body=b"kept")
    made = stack.mlflow("experiments/create", {"name": "kept"}).json()
    stack.mlflow("runs/create", {"experiment_id": made["experiment_id"], "run_name": "kept"})
    flow = stack.api("POST", "flows/", {"name": "kept"}).json()["id"]
    stack.api("POST", "flow_runs/", {"name": "kept", "flow_id": flow}).raise_for_status()
    return stack


@pytest.mark.rest
@pytest.mark.usefixtures("kept")
def test_a_killed_part_is_started_again_with_its_data(stack):
    """`kill -9` of each one after another: it comes back, and what was written is there."""
    for part in PARTS:
        pid = stack.pids()[part]
        os.kill(pid, signal.SIGKILL)
        found = stack.wait_healthy(part, pid)
        assert {one["name"] for one in found["parts"]} == set(PARTS)
    assert_data(stack)


@pytest.mark.usefixtures("kept")
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
    stack.listening = listening(stack)
    ports, sockets = stack.listening
    assert ports > set(stack.ports.values())
    assert {path.parent for path in sockets} >= {stack.folder / "s3", Path("/tmp")}
    assert Stack(stack.folder).runtime / "supervisor.sock" in sockets
    assert "has ended" in stack.sdn("down", "--store", str(stack.root))
    assert up.wait(60) == 0
    assert "ended by another command" in log.read_text()


def test_after_down_nothing_is_left(stack):
    """No process carries the mark; no port and no socket of any of them is there."""
    assert_nothing_is_left(stack)
    assert "no process" in stack.sdn("down", "--store", str(stack.root))
    said = stack.sdn("status", "--store", str(stack.root), ok=1)
    assert "does not run" in said


def test_data_are_there_after_down_and_up_and_a_closed_terminal_ends_all(stack):
    """What was written before `down` is read after `up`; then nothing is left of that either."""
    with terminal(stack) as (up, screen):
        said = read_until(screen, "Ctrl-C ends all of it", up)
        assert "is up after" in said
        assert "deploying" not in (stack.folder / "logs" / "deploy.log").read_text()
        assert_data(stack)
        stack.listening = listening(stack)
        screen.close()
        assert up.wait(60) == 0
    assert_nothing_is_left(stack)


def test_ctrl_c_ends_a_half_started_stack(stack):
    """While it waits for its parts, too; pressed again and again it still ends all of it."""
    stack.sdn("down", "--store", str(stack.root))  # what tests before left, if any ran
    with terminal(stack) as (up, screen):
        until = time.monotonic() + 60
        while len({one.part for one in marked(stack.folder)}) < 4:
            assert up.poll() is None, read_until(screen, "error", up)
            assert time.monotonic() < until
            time.sleep(0.1)
        stack.listening = listening(stack)
        os.write(screen.fileno(), b"\x03")
        read_until(screen, "ending what was started", up)
        while up.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):  # it has ended
                os.write(screen.fileno(), b"\x03")
            up.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert up.wait(60) != 0
    assert_nothing_is_left(stack)


@pytest.mark.rest
def test_a_start_that_was_killed_goes_on(stack):
    """`kill -9` of `sdn up` at half-way: what it has started runs, and the next one ends well."""
    stack.sdn("down", "--store", str(stack.root))  # what tests before left, if any ran
    command = (COMMAND, "up", "--store", str(stack.root), "--detach", *stack.options)
    with subprocess.Popen(command, env=stack.env, stdout=subprocess.DEVNULL) as up:
        until = time.monotonic() + 60
        while len({one.part for one in marked(stack.folder)}) < 4:
            assert up.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        up.kill()
    stack.sdn("status", "--store", str(stack.root), ok=1)
    stack.up()
    assert stack.status()["healthy"]
    stack.listening = listening(stack)
    assert "has ended" in stack.sdn("down", "--store", str(stack.root))
    assert_nothing_is_left(stack)


@pytest.mark.rest
def test_a_stack_with_ray_asks_for_its_token(stack):
    """Healthy, used with the token of `env.sh`, refused without; gone after `down`."""
    names = ("ray", "dashboard")
    ray = replace(stack, ports=stack.ports | dict(zip(names, free_ports(2), strict=True)))
    ray.sdn("down", "--store", str(ray.root))  # what tests before left, if any ran
    said = ray.sdn("up", "--ray", "--detach", "--store", str(ray.root), *ray.options)
    assert "it asks for a token" in said
    assert {part["name"]: part["state"] for part in ray.status()["parts"]} == dict.fromkeys(
        (*PARTS, "ray"), "healthy"
    )
    token = Path(ray.client["RAY_AUTH_TOKEN_PATH"]).read_text()
    jobs = f"http://127.0.0.1:{ray.ports['dashboard']}/api/jobs/"
    for shown, status in ((token, 200), ("another", 403), (None, 401)):
        headers = {} if shown is None else {"Authorization": f"Bearer {shown}"}
        assert httpx.get(jobs, headers=headers, timeout=30).status_code == status
    assert run_ray(ray.client) == "42"
    without = ray.client | {"RAY_AUTH_TOKEN_PATH": "/dev/null"}
    assert "42" not in run_ray(without)
    killed = ray.pids()["ray"]
    os.kill(killed, signal.SIGKILL)
    ray.wait_healthy("ray", killed)
    assert run_ray(ray.client) == "42"
    ray.listening = listening(ray)
    assert set(ray.ports.values()) < ray.listening[0]
    assert "has ended" in ray.sdn("down", "--store", str(ray.root))
    assert_nothing_is_left(ray)


def run_ray(env):
    """What a task on the stack's Ray says, or the end of its error."""
    task = "import os, ray; ray.init(os.environ['SDN_RAY_ADDRESS'], log_to_driver=False); "
    task += "print(ray.get(ray.remote(lambda: 42).remote()))"
    done = subprocess.run(
        [sys.executable, "-c", task], env=env | {"RAY_AUTH_MODE": "token"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


IN_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
# Tests under nohup would hand on that it is ignored, which a stack keeps to.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextlib.contextmanager
def terminal(stack):
    """`sdn up` in a terminal of its own, and what is behind that terminal's screen."""
    behind, inside = pty.openpty()
    up = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, COMMAND, "up", "--store", str(stack.root)],
        env=stack.env, stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
    )  # fmt: skip
    os.close(inside)
    with os.fdopen(behind, "rb", buffering=0) as screen:
        try:
            yield up, screen
        finally:
            up.kill()
            up.wait()


def read_until(screen, words, up):
    """What is on the screen by the time that these words are."""
    said = b""
    while words.encode() not in said:
        try:
            said += screen.read(4096)
        except OSError as error:  # so the end of a terminal is read
            raise AssertionError(f"{up.wait(60)}: {said.decode()}") from error
    return said.decode()


def listening(stack):
    """Ports and sockets' files at which a process of the stack listens."""
    ports, sockets = set(), {Stack(stack.folder).runtime / "supervisor.sock"}
    for at in connections(stack):
        if at.status == psutil.CONN_LISTEN:
            ports.add(at.laddr.port)
        elif at.family == socket.AF_UNIX and at.laddr:
            path = at.folder / at.laddr
            if path.is_socket():
                sockets.add(path)
    return ports, sockets


@dataclass
class Connection:
    """What a process of the stack has open."""

    family: int
    status: str
    laddr: Any
    folder: Path
    """Where the process runs."""


def connections(stack):
    found = []
    for one in marked(stack.folder):
        with contextlib.suppress(psutil.Error):
            folder = Path(one.process.cwd())
            found += [
                Connection(at.family, at.status, at.laddr, folder)
                for at in one.process.net_connections("all")
            ]
    return found


def assert_nothing_is_left(stack):
    assert marked(stack.folder) == []
    ports, sockets = stack.listening
    there = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
    assert not there & ports
    assert not [path for path in sockets if path.exists()]
    assert not [path for path in stack.root.rglob("*") if path.is_socket()]
    assert not Stack(stack.folder).runtime.exists()


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

"""A place of its own for each test that runs commands, and the Prefect server it may use."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from pipelines.prefect_api import PrefectApi

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
COMMAND = str(Path(sys.executable).with_name("sdn"))
PREFECT = str(Path(sys.executable).with_name("prefect"))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def background(*command: str, env: dict[str, str], log: Path, group: bool = False):
    """A process, also in a group of its own, that is ended, with all it started, by its id."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=out, stderr=out, start_new_session=group
        )
    try:
        yield process
    finally:
        tree = []
        with suppress(psutil.NoSuchProcess):  # it may have been killed meanwhile
            here = psutil.Process(process.pid)
            tree = [*here.children(recursive=True), here]
        for part in tree:
            with suppress(psutil.NoSuchProcess):
                part.terminate()
        _, alive = psutil.wait_procs(tree, timeout=20)
        for part in alive:
            with suppress(psutil.NoSuchProcess):
                part.kill()


@dataclass(frozen=True)
class Place:
    """A store and the environment in which commands see nothing but it."""

    store: Path
    env: dict[str, str]

    def sdn(self, *args: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """Run `sdn` and wait for it."""
        return subprocess.run(
            [COMMAND, *args],
            env=self.env,
            cwd=self.store.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def run(self, *args: str) -> dict[str, Any]:
        """`sdn run tiny --json` that must succeed; its answer."""
        done = self.sdn("run", "tiny", "--store", str(self.store), "--json", *args)
        assert done.returncode == 0, done.stderr[-4000:]
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


def place(folder: Path) -> Place:
    """A fresh place below `folder`, with nothing inherited that could change what is tested."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SDN_", "PREFECT_", "MLFLOW_"))}
    env |= {"PREFECT_HOME": str(folder / "prefect"), "SDN_CPUS": "2", "OMP_NUM_THREADS": "1"}
    return Place(store=folder / "store", env=env)


@dataclass(frozen=True)
class Server:
    """A Prefect server with the deployed flows and one worker."""

    api: str
    ui: str
    """Address of its page."""
    deployments: dict[str, dict[str, Any]]
    """By name."""
    worker: int
    """Process id."""
    log: Path
    """What the worker and the flows say."""
    folder: Path
    """From which the flows were deployed."""

    def post(self, path: str, content: dict[str, Any]) -> Any:
        """The server's answer to a request."""
        with PrefectApi(self.api) as api:
            return api.ask("POST", path, content)

    def start(self, store: Path, changes: list[str], env: dict[str, str] | None = None) -> str:
        """Create a run of the tiny recipe, as the form of the UI does; its id."""
        parameters = {"recipe": "tiny", "store": str(store), "changes": changes}
        return self.start_flow("sdn-pipeline", parameters, env)

    def start_flow(
        self, name: str, parameters: dict[str, Any], env: dict[str, str] | None = None
    ) -> str:
        """Create a run of a deployment; its id."""
        content = {"parameters": parameters, "job_variables": {"env": env or {}}}
        run = self.post(f"deployments/{self.deployments[name]['id']}/create_flow_run", content)
        return str(run["id"])

    def state(self, run: str) -> str:
        """Type of the state a flow run is in."""
        return str(httpx.get(f"{self.api}/flow_runs/{run}", timeout=30).json()["state"]["type"])

    def wait_until(self, check: Callable[[], Any], seconds: float, what: str) -> Any:
        """The first true answer of `check`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := check():
                return found
            time.sleep(0.2)
        said = self.log.read_text()[-4000:]
        raise AssertionError(f"{what} did not happen within {seconds} s; the worker said {said}")


def healthy(api: str) -> bool:
    """Whether a Prefect server answers there."""
    try:
        return httpx.get(f"{api}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


@contextmanager
def prefect_server(folder: Path, port: int, env: dict[str, str]):
    """`prefect server start`, once it answers."""
    serve = (PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with background(*serve, env=env, log=folder / "server.log") as process:
        until = time.monotonic() + 180  # busy cores
        while not healthy(f"http://127.0.0.1:{port}/api"):
            assert time.monotonic() < until, (folder / "server.log").read_text()[-2000:]
            time.sleep(0.5)
        yield process


def deploy(api: str, env: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The work pool, and `prefect deploy --all`; the deployments by name."""
    for args in (("work-pool", "create", "sdn", "--type", "process"), ("deploy", "--all")):
        done = subprocess.run(
            [PREFECT, "--no-prompt", *args],
            env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    found = httpx.post(f"{api}/deployments/filter", json={}).json()
    return {deployment["name"]: deployment for deployment in found}


WORK = (PREFECT, "worker", "start", "--pool", "sdn")

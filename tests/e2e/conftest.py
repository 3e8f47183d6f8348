"""The whole tiny chain, run once as a user runs it, for all tests that look at what it left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("sdn"))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def background(*command: str, env: dict[str, str], log: Path):
    """A process that is ended, with all it started, by its id."""
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=out)
    try:
        yield process
    finally:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for part in tree:
            part.terminate()
        _, alive = psutil.wait_procs(tree, timeout=20)
        for part in alive:
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


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, dict[str, Any]]:
    """A place in which `sdn run tiny` has run once, and what it answered."""
    here = place(tmp_path_factory.mktemp("chain"))
    return here, here.run()

"""The flow on a Prefect server, started the way its UI does, done by a worker."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
from conftest import ROOT, background, free_port

PREFECT = str(Path(sys.executable).with_name("prefect"))


def wait_until(check, seconds: float, what: str):
    """The first true answer of `check`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def test_a_worker_runs_the_deployed_flow(chain, tmp_path):
    """`prefect deploy --all` on a server; a run created there is done by a worker, with Ray."""
    here, _ = chain
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    env = here.env | {"PREFECT_HOME": str(tmp_path / "server")}
    on_server = env | {"PREFECT_API_URL": api}

    def healthy() -> bool:
        try:
            return httpx.get(f"{api}/health", timeout=2).is_success
        except httpx.HTTPError:
            return False

    def prefect(*args: str) -> str:
        done = subprocess.run(
            [PREFECT, "--no-prompt", *args],
            env=on_server, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    server = (PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with background(*server, env=env, log=tmp_path / "server.log"):
        wait_until(healthy, 60, "the server's health")
        prefect("work-pool", "create", "sdn", "--type", "process")
        prefect("deploy", "--all")
        (deployment,) = httpx.post(f"{api}/deployments/filter", json={}).json()
        assert deployment["name"] == "sdn-pipeline"
        schema = deployment["parameter_openapi_schema"]["properties"]
        assert "tiny" in json.dumps(schema["recipe"])
        assert schema["changes"]["description"]
        parameters = {
            "recipe": "tiny",
            "store": str(here.store),
            "changes": ["search.trials=0", "stage_two.epochs=1"],
        }
        run = httpx.post(
            f"{api}/deployments/{deployment['id']}/create_flow_run", json={"parameters": parameters}
        ).json()
        worker = (PREFECT, "worker", "start", "--pool", "sdn")
        with background(*worker, env=on_server, log=tmp_path / "worker.log"):

            def ended() -> str:
                state = httpx.get(f"{api}/flow_runs/{run['id']}").json()["state"]
                final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
                return state["type"] if state["type"] in final else ""

            state = wait_until(ended, 240, "the end of the flow run")
        assert state == "COMPLETED", (tmp_path / "worker.log").read_text()[-4000:]
        artifacts = httpx.post(f"{api}/artifacts/filter", json={}).json()
        mine = {a["key"] for a in artifacts if a["flow_run_id"] == run["id"]}
        assert {"resolved-config", "progress-stage-two", "result"} <= mine

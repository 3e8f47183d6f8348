"""`sdn ui` serves the pages of both servers and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import time

import httpx
import psutil
from places import COMMAND, free_port


def test_both_pages_answer_and_end_with_ctrl_c(chain, tmp_path):
    """The registered model is on MLflow's server, flow runs on Prefect's; Ctrl-C ends both."""
    here, answer = chain
    mlflow, prefect = free_port(), free_port()
    ports = ("--mlflow-port", str(mlflow), "--prefect-port", str(prefect))
    log = tmp_path / "ui.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [COMMAND, "ui", "--store", str(here.store), *ports],
            env=here.env, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while "Ctrl-C ends both" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        name = answer["model"]["name"]
        found = httpx.get(
            f"http://127.0.0.1:{mlflow}/api/2.0/mlflow/registered-models/get", params={"name": name}
        )
        assert found.json()["registered_model"]["name"] == name
        flows = httpx.post(f"http://127.0.0.1:{prefect}/api/flows/filter", json={}).json()
        assert [flow["name"] for flow in flows] == ["sdn-pipeline"]
        for port in (mlflow, prefect):
            assert "<html" in httpx.get(f"http://127.0.0.1:{port}/", follow_redirects=True).text
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 2
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, log.read_text()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive

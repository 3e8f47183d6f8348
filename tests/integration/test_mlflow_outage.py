"""A stage whose MLflow server is killed, frozen, and comes back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from pipelines.flows import stages
from pipelines.flows.stages import Tracked
from pipelines.run import Done, Job
from pipelines.settings import Settings
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from sdn.data.files import LocalFolder
from sdn.journal import Journal

MLFLOW = str(Path(sys.executable).with_name("mlflow"))
STAGE = Stage(name="stage_one", config={"n": 1})
pytestmark = pytest.mark.timeout(240)


class Server:
    """MLflow on SQLite on a fixed port, as often started and killed as a test likes."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder, self.process = folder, None

    def start(self):
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [MLFLOW, "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "mlflow.log").open("a") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        until = time.monotonic() + 90
        while True:
            try:
                if httpx.get(f"{self.uri}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert time.monotonic() < until, (self.folder / "mlflow.log").read_text()[-2000:]
            time.sleep(0.2)

    def signal(self, number):
        tree = [*psutil.Process(self.process.pid).children(recursive=True)]
        for process in [*tree, psutil.Process(self.process.pid)]:
            process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture
def server(tmp_path):
    found = Server(tmp_path)
    yield found
    if found.process is not None and found.process.poll() is None:
        found.signal(signal.SIGCONT)
        found.signal(signal.SIGKILL)


@contextmanager
def training(folder, tracked, monkeypatch):
    """A stage at work; yields what writes a point."""
    monkeypatch.setattr(stages, "_SYNC_EVERY_S", 0.3)
    place = LocalFolder(folder / "place")
    job = Job(stage=STAGE, work=lambda _: {})
    with Journal(place, "points/0000", every_s=float("inf")) as journal:

        def write(step):
            losses = {"loss/image": 1.0, "loss/total": 1.0}
            values = {"time_ms": 1_700_000_000_000 + step, "images_seen": 8, "losses": losses}
            journal.add(step, values | {"rate": 0.1, "images_per_s": 5.0})
            journal.flush()

        with tracked.mirroring(job, place):
            yield write


def finished(folder, tracked):
    done = Done(
        name="stage_one", key=STAGE.key, folder="f", result={"steps": 60}, seconds=1, fresh=True
    )
    tracked.finished(done, LocalFolder(folder / "place"))


def check(server, tracked):
    """All points are there, each once, and the run has ended well."""
    tracked.tracker._client = None
    run = tracked.tracker.run("stage_one", STAGE.key)
    for name in ("loss/total", "loss/image", "rate"):
        steps = [m.step for m in tracked.tracker.client.get_metric_history(run, name)]
        assert steps == list(range(20, 1201, 20)), name
    assert tracked.tracker.finished(run)


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param("down before", marks=pytest.mark.rest),
        "killed",
        pytest.param("frozen", marks=pytest.mark.rest),
    ],
)
def test_an_outage_costs_a_warning_alone(server, tmp_path, monkeypatch, caplog, trouble):
    """Down before, killed or frozen in the middle: the work goes on, and afterwards MLflow has
    every point once.
    """
    settings = Settings(store=str(tmp_path / "store"), tracking_uri=server.uri)
    tracked = Tracked(Tracker(settings, "some"), "some", "key of the parent")
    if trouble != "down before":
        server.start()
    with training(tmp_path, tracked, monkeypatch) as write:
        for step in range(20, 1201, 20):
            write(step)
            time.sleep(0.02)
            if step == 600 and trouble != "down before":
                time.sleep(1)
                server.signal(signal.SIGKILL if trouble == "killed" else signal.SIGSTOP)
        time.sleep(2)
        began = time.monotonic()
    print(f"\n{trouble}: {time.monotonic() - began:.1f} s until the stage went on")
    began = time.monotonic()
    finished(tmp_path, tracked)
    print(f"{trouble}: {time.monotonic() - began:.1f} s until its end was given up")
    assert "MLflow" in caplog.text
    if trouble == "frozen":
        server.signal(signal.SIGCONT)
    else:
        server.start()
    finished(tmp_path, tracked)
    check(server, tracked)

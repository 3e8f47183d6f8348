"""What ends suddenly in operation: a worker with its flow, the Prefect server, MLflow's server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import httpx
import mlflow
import psutil
import pytest
from places import COMMAND, WORK, Server, background, deploy, free_port, place, prefect_server

from pipelines.flows.pulse import read_pulse
from sdn.checkpoint import Checkpoints
from sdn.data.files import LocalFolder
from sdn.journal import journal_files

LEASES = "prefect.server.concurrency.lease_storage.filesystem"
"""Slots that outlive a restart of the server."""
pytestmark = pytest.mark.timeout(600)


def run_of(server: Server, run: str):
    """All that the server knows of a flow run."""
    (found,) = server.post("flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    return found


def slots(server: Server) -> int:
    """Slots of the pipeline's deployment that are taken."""
    about = server.deployments["sdn-pipeline"]["id"]
    found = server.post("deployments/filter", {"deployments": {"id": {"any_": [about]}}})
    return int(found[0]["global_concurrency_limit"]["active_slots"])


def marks(store):
    """When each finished stage was finished."""
    return {path: path.stat().st_mtime_ns for path in store.glob("stages/*/done.json")}


def kill(*processes: psutil.Process) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=20)


@pytest.mark.rest
def test_a_run_outlives_its_worker_and_its_server(chain, tmp_path):
    """Worker and flow are killed in mid-run: a true state, a free slot, one successor that goes on
    from the checkpoint, and through a killed and restarted Prefect server, to its end.
    """
    here, _ = chain
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    env = place(tmp_path).env | {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES}
    on_server = env | {"PREFECT_API_URL": api}
    database = f"sqlite:///{tmp_path}/mlflow.db"
    told = tmp_path / "told"
    script = tmp_path / "tell.py"
    script.write_text("import sys\nopen(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')\n")
    telling = on_server | {"SDN_NOTIFY_COMMAND": f"{sys.executable} {script} {told}"}
    trainings = here.store / "training"
    before, done = set(trainings.iterdir()), marks(here.store)
    look = (COMMAND, "reconcile", "--every", "2")
    with ExitStack() as stack, background(*look, env=telling, log=tmp_path / "look.log"):
        server_process = stack.enter_context(prefect_server(tmp_path, port, env))
        deployments = deploy(api, on_server)
        first = stack.enter_context(background(*WORK, env=on_server, log=tmp_path / "first.log"))
        server = Server(api, "", deployments, first.pid, tmp_path / "first.log", tmp_path)
        changes = ["search.trials=0", "stage_two.epochs=70"]
        run = server.start(here.store, changes, {"SDN_TRACKING_URI": database})

        def training():
            assert server.state(run) in {"SCHEDULED", "PENDING", "RUNNING"}
            found = [one for one in set(trainings.iterdir()) - before if any(one.glob("points/*"))]
            return [one for one in found if Checkpoints(LocalFolder(one)).newest()]

        (training_place,) = server.wait_until(training, 240, "a checkpoint of stage two")
        flow = read_pulse(run_of(server, run)["labels"]).process.pid
        assert slots(server) == 1
        began = time.monotonic()
        worker = psutil.Process(first.pid)
        between = [one for one in worker.children() if flow in {p.pid for p in one.children()}]
        kill(worker, *between, psutil.Process(flow))
        server.wait_until(lambda: server.state(run) == "CRASHED", 60, "the state CRASHED")
        print(f"\nfound dead after {time.monotonic() - began:.1f} s")
        crashed = run_of(server, run)
        assert f"process {flow}" in crashed["state"]["message"]
        server.wait_until(lambda: slots(server) == 0, 5, "a free slot")
        again = server.wait_until(
            lambda: server.post(
                "flow_runs/filter", {"flow_runs": {"name": {"like_": f"{crashed['name']} again"}}}
            ),
            10, "a successor",
        )  # fmt: skip
        assert [one["parameters"] for one in again] == [crashed["parameters"]]
        successor = again[0]["id"]

        def left_running():
            client = mlflow.MlflowClient(database)
            places = [one.experiment_id for one in client.search_experiments()]
            return client.search_runs(places, "attributes.status = 'RUNNING'")

        server.wait_until(lambda: not left_running(), 30, "an end of MLflow's runs")
        tasks = server.post("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        assert not [one["name"] for one in tasks if one["state"]["type"] == "RUNNING"]
        (notice,) = [json.loads(line) for line in told.read_text().splitlines()]
        assert notice["kind"] == "failure"
        assert notice["link"] == f"http://127.0.0.1:{port}/runs/flow-run/{run}"
        assert successor in notice["text"]

        attempts = len(list(journal_files(LocalFolder(training_place), "points")))
        second = tmp_path / "second.log"
        stack.enter_context(background(*WORK, env=on_server, log=second))
        server = Server(api, "", deployments, 0, second, tmp_path)

        def goes_on():
            return len(list(journal_files(LocalFolder(training_place), "points"))) > attempts

        server.wait_until(goes_on, 120, "another attempt of the same training")
        whole = psutil.Process(server_process.pid)
        kill(*whole.children(recursive=True), whole)
        time.sleep(5)
        stack.enter_context(prefect_server(tmp_path, port, env))
        server.wait_until(
            lambda: server.state(successor) in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"},
            240, "the end of the successor",
        )  # fmt: skip
        assert server.state(successor) == "COMPLETED", second.read_text()[-4000:]
        pipeline = {"deployments": {"id": {"any_": [deployments["sdn-pipeline"]["id"]]}}}
        everything = server.post("flow_runs/filter", pipeline)
        assert {one["id"] for one in everything} == {run, successor}
        assert not left_running()
        server.wait_until(lambda: slots(server) == 0, 10, "a free slot")
    assert set(trainings.iterdir()) - before == {training_place}
    assert {path: when for path, when in marks(here.store).items() if path in done} == done
    audit = here.sdn("ledger", training_place.name, "--store", str(here.store), "--json")
    assert audit.returncode == 0, audit.stderr + audit.stdout


def answers(url: str) -> bool:
    """Whether MLflow does."""
    try:
        return httpx.get(f"{url}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


@pytest.mark.rest
def test_a_run_outlives_its_mlflow(chain, tmp_path):
    """MLflow's server is killed while stage two trains, and stays away: the training goes on to its
    end, the run says what it could not do; the same command then only makes up for it.
    """
    here, _ = chain
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    place_of_server = ("--port", str(port), "--artifacts", str(tmp_path / "artifacts"))
    words = (*place_of_server, "--database", f"sqlite:///{tmp_path}/mlflow.db")
    serve = (COMMAND, "serve", "mlflow", *words)
    env = here.env | {"SDN_TRACKING_URI": url}
    changes = ("--set", "search.trials=0", "--set", "stage_two.epochs=50")
    command = (COMMAND, "run", "tiny", "--store", str(here.store), "--json", *changes)
    trainings = here.store / "training"
    before = set(trainings.iterdir())

    def wait(check, what):
        until = time.monotonic() + 240
        while not (found := check()):
            assert time.monotonic() < until, f"no {what}: {log.read_text()[-4000:]}"
            time.sleep(0.2)
        return found

    def checkpoint():
        found = [one for one in set(trainings.iterdir()) - before if any(one.glob("points/*"))]
        return [one for one in found if Checkpoints(LocalFolder(one)).newest()]

    log = tmp_path / "run.log"
    with ExitStack() as stack:
        first = stack.enter_context(background(*serve, env=env, log=tmp_path / "first.log"))
        wait(lambda: answers(url), "MLflow")
        run = stack.enter_context(background(*command, env=env, log=log))
        (training_place,) = wait(checkpoint, "checkpoint of stage two")
        began = Checkpoints(LocalFolder(training_place)).newest()
        server = psutil.Process(first.pid)
        kill(*server.children(recursive=True), server)
        assert not answers(url)
        run.wait(timeout=400)
    said = log.read_text()
    newest = Checkpoints(LocalFolder(training_place)).newest()
    assert began.step < newest.step == newest.steps
    assert run.returncode != 0
    assert url in said
    done = marks(here.store)

    with background(*serve, env=env, log=tmp_path / "second.log"):
        wait(lambda: answers(url), "MLflow")
        again = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
        )
        assert again.returncode == 0, again.stderr[-4000:]
        answer = json.loads(again.stdout.splitlines()[-1])
        # The registry by name: MLflow's default is the one that a test before may have set.
        client = mlflow.MlflowClient(url, url)
        places = [one.experiment_id for one in client.search_experiments()]
        found = client.search_runs(places, "tags.mlflow.runName = 'stage_two'")
        (nested,) = [one for one in found if one.info.status == "FINISHED"]
        steps = [one.step for one in client.get_metric_history(nested.info.run_id, "loss/total")]
        assert steps == sorted(set(steps))
        assert steps[-1] == newest.steps
        assert client.get_model_version(answer["model"]["name"], answer["model"]["version"])
    assert {path: when for path, when in marks(here.store).items() if path in done} == done
    assert set(trainings.iterdir()) - before == {training_place}

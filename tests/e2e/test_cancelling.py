"""A run that is cancelled in Prefect, or ended by a signal, while a stage trains."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress

import psutil
import pytest
from browser import browser_page
from places import COMMAND, background, place
from ray_cluster import ray_cluster

from pipelines import jobs
from pipelines.trials import TrialLedger
from sdn.checkpoint import Checkpoints
from sdn.data.files import LocalFolder

pytestmark = pytest.mark.timeout(600)
STACKS = "(most recent call first)"
"""What `pipelines.flows.last_words` shows of a run that it has to end."""


@pytest.fixture
def cluster(request, tmp_path):
    """Where Ray runs: None for in the flow's own process."""
    if request.param == "embedded":
        yield None
        return
    with ray_cluster(tmp_path) as found:
        yield found


@pytest.mark.parametrize(
    "cluster", ["embedded", pytest.param("cluster", marks=pytest.mark.rest)], indirect=True
)
def test_cancelling_stops_the_training_within_30_s(chain, server, cluster, tmp_path):
    """By the button of the run's page: a last checkpoint, no job, no process left."""
    here, _ = chain
    trainings = here.store / "training"
    before = set(trainings.iterdir())
    # Its runs are not among those that other tests look at.
    env = {"SDN_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    if cluster is not None:
        env["SDN_RAY_ADDRESS"] = cluster.address
    # Of different lengths, so that each is a training of its own.
    epochs = 900 if cluster is None else 901
    run = server.start(here.store, ["search.trials=0", f"stage_two.epochs={epochs}"], env)

    def training():
        assert server.state(run) in {"SCHEDULED", "PENDING", "RUNNING"}, server.log.read_text()
        return [one for one in set(trainings.iterdir()) - before if any(one.glob("points/*"))]

    (place,) = server.wait_until(training, 240, "the first points of stage two")
    worker = psutil.Process(server.worker)
    tree = worker.children(recursive=True)
    assert tree
    began = cancel_by_clicks(server, run)
    server.wait_until(lambda: server.state(run) == "CANCELLED", 60, "the state CANCELLED")
    said = time.monotonic() - began
    server.wait_until(lambda: not any(one.is_running() for one in tree), 60, f"the end of {tree}")
    gone = time.monotonic() - began
    print(f"\ncancelled after {said:.1f} s, no process left after {gone:.1f} s")
    assert gone < 30
    about = {"deployments": {"id": {"any_": [server.deployments["sdn-pipeline"]["id"]]}}}
    (deployment,) = server.post("deployments/filter", about)
    assert deployment["global_concurrency_limit"]["active_slots"] == 0
    ended = "goes on from the last checkpoint" if cluster is None else "is stopped"
    assert ended in server.log.read_text()
    if cluster is not None:
        client = jobs.connect(cluster.dashboard)
        (job,) = client.list_jobs()
        assert job.status.value == "STOPPED"
        assert jobs._actors_alive(client, job.submission_id) == 0
    newest = Checkpoints(LocalFolder(place)).newest()
    assert newest is not None
    assert 0 < newest.step < newest.steps


def cancel_by_clicks(server, run):
    """On the run's page in a browser; when the last click was made."""
    with browser_page(1100, 900) as page:
        page.set_default_timeout(60_000)
        page.goto(f"{server.ui}/v2/runs/flow-run/{run}")
        page.get_by_role("tab", name="Artifacts").wait_for()
        page.locator("main button[aria-haspopup=menu]").first.click()
        page.get_by_role("menuitem", name="Cancel", exact=True).click()
        asked = page.get_by_role("alertdialog")
        began = time.monotonic()
        asked.get_by_role("button", name="Cancel Flow Run").click()
        asked.wait_for(state="detached")
    return began


@pytest.mark.rest
@pytest.mark.parametrize("cluster", ["embedded", "cluster"], indirect=True)
def test_cancelling_stops_a_search_within_30_s(chain, server, cluster, tmp_path):
    """All trials end, no process and no actor is left, and no trial counts as failed for it."""
    here, _ = chain
    trainings = here.store / "training"
    env = {"SDN_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    if cluster is not None:
        env["SDN_RAY_ADDRESS"] = cluster.address
    trials = 300 if cluster is None else 301
    before = set(trainings.glob("search-*"))
    run = server.start(here.store, [f"search.trials={trials}", "search.images=4000"], env)

    def searching():
        assert server.state(run) in {"SCHEDULED", "PENDING", "RUNNING"}, server.log.read_text()
        found = [TrialLedger(LocalFolder(one)) for one in set(trainings.glob("search-*")) - before]
        return [one for one in found if one.open() and sum(t.ended for t in one.all()) > 2]

    (ledger,) = server.wait_until(searching, 240, "the end of three trials")
    tree = psutil.Process(server.worker).children(recursive=True)
    assert tree
    began = time.monotonic()
    server.post(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    server.wait_until(lambda: server.state(run) == "CANCELLED", 60, "the state CANCELLED")
    server.wait_until(lambda: not any(one.is_running() for one in tree), 60, f"the end of {tree}")
    gone = time.monotonic() - began
    print(f"\nno process left after {gone:.1f} s")
    assert gone < 30
    if cluster is not None:
        from ray.util.state import list_actors

        alive = list_actors(address=cluster.dashboard, filters=[("state", "!=", "DEAD")])
        assert not [one for one in alive if "Implicit" in one.class_name], alive
    after = TrialLedger(ledger._files)
    assert {trial.state for trial in after.all()} <= {"running", "finished", "stopped"}
    assert len(after.all()) < trials


def tree_at_teacher(process, log):
    """All that a run has started, once its teacher begins."""
    until = time.monotonic() + 120
    while " teacher " not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    return psutil.Process(process.pid).children(recursive=True)


def is_server(process):
    """Whether it is Prefect's; not where it has ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        return "uvicorn" in process.cmdline()
    return False


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.rest)]
)
def test_a_signal_to_the_whole_group_ends_a_run(tmp_path, sent):
    """As a Ctrl-C in a terminal, `timeout` and service managers send it: Prefect's temporary server
    does not get it, for a run whose server is gone waits minutes for it.
    """
    here, log = place(tmp_path), tmp_path / "log"
    command = (COMMAND, "run", "tiny", "--store", str(here.store))
    with background(*command, env=here.env, log=log, group=True) as process:
        tree = tree_at_teacher(process, log)
        os.killpg(process.pid, sent)
        try:
            assert process.wait(60) != 0
        except subprocess.TimeoutExpired:
            pytest.fail(f"it still runs; its log:\n{log.read_text()}")
        _, alive = psutil.wait_procs(tree, timeout=30)
        assert not alive
        said = log.read_text()
        assert "Connection refused" not in said
        assert STACKS not in said, said  # it has ended by itself


@pytest.mark.rest
def test_an_interrupted_run_does_not_wait_for_a_server_that_died(tmp_path):
    """Prefect would try to reach it for minutes."""
    here, log = place(tmp_path), tmp_path / "log"
    command = (COMMAND, "run", "tiny", "--store", str(here.store))
    with background(*command, env=here.env, log=log, group=True) as process:
        tree = tree_at_teacher(process, log)
        (server,) = [one for one in tree if is_server(one)]
        server.kill()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 1
        assert STACKS in log.read_text()
        _, alive = psutil.wait_procs(tree, timeout=30)
        assert not alive

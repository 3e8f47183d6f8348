"""The reconciler on a real Prefect server: what it settles, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import json
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.states import Cancelling, Paused, Pending, Running

from pipelines.flows import reconciling
from pipelines.flows.pulse import PULSE, TRACKING, living, read_pulse, written
from pipelines.flows.reconciling import REVIVAL, NoServerError, Reconciler
from pipelines.liveness import Limits, Pulse
from pipelines.processes import this_process
from pipelines.settings import Settings
from pipelines.tracking import Tracker

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def server():
    """A Prefect server of these tests alone."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=90):
        yield


@pytest.fixture(scope="module")
def deployments(server):
    """Deployments of a pipeline with one slot, of a rollback, and of a flow of somebody else."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="sdn", type="process"))
        found = {}
        for name, limit in (("sdn-pipeline", 1), ("sdn-rollback", None), ("other", None)):
            number = client.create_flow_from_name(name)
            found[name] = client.create_deployment(
                number, name=name, work_pool_name="sdn",
                concurrency_limit=limit,
            )  # fmt: skip
        return found


@pytest.fixture
def client(server):
    with get_client(sync_client=True) as found:
        yield found


def claimed(client, deployment, *states, pulse=None, labels=None):
    """A run of a deployment that went through these states, with a record."""
    run = client.create_flow_run_from_deployment(deployment)
    for state in states:
        client.set_flow_run_state(run.id, state)
    run = client.read_flow_run(run.id)
    about = dict(labels or {})
    if pulse is not None:
        about[PULSE] = written(Pulse(process=pulse, run_count=run.run_count, beat=1))
    if about:
        client.update_flow_run_labels(run.id, about)
    return run.id


def state(client, run):
    return client.read_flow_run(run).state.type.value


def settings(folder, **changes):
    return Settings(store=str(folder / "store"), **changes)


DEAD = dataclasses.replace(this_process(), started="1")
AT_WORK = (Pending(), Running())


@pytest.fixture
def ended(client):
    """Ends what a test leaves, so that the next one finds a free slot."""
    yield
    from prefect.states import Cancelled

    for run in client.read_flow_runs():
        if not run.state.is_final():
            client.set_flow_run_state(run.id, Cancelled(), force=True)


def slot(client):
    return sum(one.active_slots for one in client.read_global_concurrency_limits(10, 0))


def test_a_dead_run_is_settled_and_goes_on_once(client, deployments, tmp_path, ended):
    """CRASHED at the second look, its slot freed, MLflow's run ended, and one successor, though two
    reconcilers look at once.
    """
    here = settings(tmp_path)
    tracker = Tracker(here, "tiny", "")
    place = f"sqlite:///{tmp_path}/store/mlflow.db"
    run = claimed(client, deployments["sdn-pipeline"], *AT_WORK, pulse=DEAD,
                  labels={TRACKING: place})  # fmt: skip
    tracker.owner = str(run)
    left = tracker.run("stage", "key")
    assert slot(client) == 1
    both = Reconciler(here), Reconciler(here)
    assert [one.look() for one in both] == [[], []]
    assert state(client, run) == "RUNNING"
    settled = [found for one in both for found in one.look()]
    assert [(one.state, one.run) for one in settled] == [("CRASHED", str(run))]
    assert slot(client) == 0
    assert state(client, run) == "CRASHED"
    assert tracker.client.get_run(left).info.status == "FAILED"
    successor = client.read_flow_run(settled[0].successor)
    assert successor.labels[REVIVAL] == 1
    assert successor.state.is_scheduled()
    assert reconciling._successor(client.read_flow_run(run), 3) == settled[0].successor
    assert [one.look() for one in both] == [[], []]


@pytest.mark.parametrize(
    ("states", "pulse"),
    [
        (AT_WORK, this_process()),
        (AT_WORK, dataclasses.replace(this_process(), machine="another", pid=1)),
        (AT_WORK, None),
        ((Pending(),), None),
        ((*AT_WORK, Paused(timeout_seconds=600)), DEAD),
        ((), DEAD),
    ],
    ids=["alive", "elsewhere", "no record", "pending", "paused", "scheduled"],
)
def test_what_may_live_is_left_alone(client, deployments, tmp_path, ended, states, pulse):
    """Whatever is not known to be dead keeps its state, look after look."""
    run = claimed(client, deployments["sdn-pipeline"], *states, pulse=pulse)
    before = client.read_flow_run(run).state
    reconciler = Reconciler(settings(tmp_path))
    assert [reconciler.look() for _ in range(4)] == [[]] * 4
    assert client.read_flow_run(run).state.id == before.id


def test_an_earlier_attempt_says_nothing(client, deployments, tmp_path, ended):
    """A run that goes on as another process still bears the record of the first for a moment."""
    run = claimed(client, deployments["sdn-pipeline"], *AT_WORK, pulse=DEAD)
    old = read_pulse(client.read_flow_run(run).labels)
    client.update_flow_run_labels(run, {PULSE: written(dataclasses.replace(old, run_count=0))})
    reconciler = Reconciler(settings(tmp_path))
    assert [reconciler.look() for _ in range(3)] == [[]] * 3


def test_a_run_that_was_being_cancelled_ends_cancelled(client, deployments, tmp_path, ended):
    """What was asked for comes true, and nothing goes on."""
    claimed(client, deployments["sdn-pipeline"], *AT_WORK, Cancelling(), pulse=DEAD)
    reconciler = Reconciler(settings(tmp_path))
    reconciler.look()
    (found,) = reconciler.look()
    assert (found.state, found.successor) == ("CANCELLED", None)
    assert slot(client) == 0


def test_what_is_not_started_again(client, deployments, tmp_path, ended):
    """A rollback would undo itself, and what died often enough stays dead; both are CRASHED."""
    here = settings(tmp_path, revivals=2)
    runs = {
        claimed(client, deployments["sdn-rollback"], *AT_WORK, pulse=DEAD),
        claimed(client, deployments["sdn-pipeline"], *AT_WORK, pulse=DEAD, labels={REVIVAL: 2}),
    }
    reconciler = Reconciler(here)
    reconciler.look()
    settled = reconciler.look()
    assert {(one.state, one.successor) for one in settled} == {("CRASHED", None)}
    assert {one.run for one in settled} == {str(run) for run in runs}


def test_runs_of_others_are_never_touched(client, deployments, tmp_path, ended):
    """On a shared server, whatever their labels say."""
    run = claimed(client, deployments["other"], *AT_WORK, pulse=DEAD)
    reconciler = Reconciler(settings(tmp_path))
    assert [reconciler.look() for _ in range(3)] == [[]] * 3
    assert state(client, run) == "RUNNING"


def test_a_run_that_changed_in_the_last_moment_is_left_alone(
    client, deployments, tmp_path, ended, monkeypatch
):
    """Between the look and the deed it has ended: its own word counts."""
    from prefect.states import Completed

    run = claimed(client, deployments["sdn-pipeline"], *AT_WORK, pulse=DEAD)
    reconciler = Reconciler(settings(tmp_path))
    reconciler.look()
    seen = reconciling.claims(client)
    client.set_flow_run_state(run, Completed())
    monkeypatch.setattr(reconciling, "claims", lambda _: seen)
    assert reconciler.look() == []
    assert state(client, run) == "COMPLETED"


def test_a_worker_that_died_before_the_process_began(client, deployments, tmp_path, ended):
    """PENDING, and its worker not heard of for long enough: CRASHED, and another goes on."""
    name = "gone"
    client.request("POST", "/work_pools/sdn/workers/heartbeat",
                   json={"name": name})  # fmt: skip
    labels = {"prefect.worker.name": name, "prefect.work-pool.name": "sdn"}
    run = claimed(client, deployments["sdn-pipeline"], Pending(), labels=labels)
    import time

    reconciler = Reconciler(settings(tmp_path), Limits(start_s=0.5))
    reconciler.look()
    time.sleep(0.6)
    (found,) = reconciler.look()
    assert (found.run, found.state) == (str(run), "CRASHED")
    assert found.successor is not None


def test_a_flow_keeps_its_record_and_takes_it_back(client, tmp_path):
    """In the body of a flow the server has its process; after it, nothing that could mislead."""
    seen = []

    @flow(name="sdn-test")
    def body():
        from prefect.runtime import flow_run

        with living(settings(tmp_path)):
            run = flow_run.get_id()
            for _ in range(1000):
                labels = client.read_flow_run(run).labels
                if PULSE in labels:
                    break
            seen.append((run, read_pulse(labels), labels[TRACKING]))

    body()
    ((run, pulse, tracking),) = seen
    assert pulse.process == this_process()
    assert pulse.run_count == 1
    assert tracking == f"sqlite:///{tmp_path}/store/mlflow.db"
    assert read_pulse(client.read_flow_run(run).labels) is None


def test_a_run_set_to_an_end_from_outside_ends_its_process(client, tmp_path, monkeypatch):
    """Thought lost while its machine slept, it may go on elsewhere: here it ends."""
    from prefect.states import Crashed

    from pipelines.flows import pulse

    monkeypatch.setattr(pulse, "BEAT_EVERY_S", 0.2)
    ended = []
    monkeypatch.setattr(pulse.os, "kill", lambda pid, number: ended.append((pid, number)))

    @flow(name="sdn-test")
    def body():
        import time

        from prefect.runtime import flow_run

        with living(settings(tmp_path)):
            client.set_flow_run_state(flow_run.get_id(), Crashed(), force=True)
            for _ in range(1200):  # a minute, on busy cores
                if ended:
                    break
                time.sleep(0.05)

    body()
    assert ended == [(this_process().pid, 15)]


def test_without_a_server_it_says_what_to_set(tmp_path):
    """No address, or nobody there: an error that names the variable."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(NoServerError, match="PREFECT_API_URL"),
    ):
        Reconciler(settings(tmp_path))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert Reconciler(settings(tmp_path)).look() == []


def test_a_record_that_cannot_be_read_is_none():
    """Of another version, cut, or empty: no evidence, no error."""
    assert read_pulse({}) is None
    assert read_pulse({PULSE: ""}) is None
    assert read_pulse({PULSE: json.dumps({"beat": 1})}) is None
    assert (
        read_pulse({PULSE: json.dumps({"beat": 1, "run_count": 1, "process": str(uuid4())})})
        is None
    )

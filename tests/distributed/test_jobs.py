"""A stage's training as a Ray Job of a cluster: followed, attached to, stopped."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest
import training_place
from following import Flow
from ray_cluster import free_ports, ray_cluster

from pipelines import jobs
from pipelines.reasons import TrainingError
from sdn.data.files import LocalFolder
from sdn.ledger import attempts_of

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The dashboard's address of a Ray head with two cores."""
    with ray_cluster(tmp_path_factory.mktemp("ray")) as found:
        yield found.dashboard


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    training_place.write_store(folder)
    return folder


def test_a_killed_flow_leaves_its_training_and_the_next_one_attaches(cluster, store, tmp_path):
    """SIGKILL of the flow: the job goes on; the same command follows it to its end, no second."""
    # Long enough that it still runs when the second flow, a new process, looks at it.
    order = training_place.order_of(store, "attached-1", epochs=120)
    first = Flow(order, cluster, tmp_path)
    first.wait("step")
    first.process.kill()
    first.process.wait()
    client = jobs.connect(cluster)
    assert client.get_job_status(order.name).value == "RUNNING"
    second = Flow(order, cluster, tmp_path)
    (done,) = second.wait("done")
    second.process.wait(30)
    assert done["step"] == 120 * 15
    assert "runs already and is followed" in second.log.read_text()
    assert len(attempts_of(LocalFolder(store / "training" / order.name))) == 1
    assert [job.submission_id for job in client.list_jobs()].count(order.name) == 1
    steps = [values["step"] for kind, values in second.heard if kind == "step"]
    assert steps == sorted(set(steps))
    assert steps[0] == 20  # what was said before it came is said again


@pytest.mark.rest
def test_an_ended_flow_stops_the_job_and_frees_the_cluster(cluster, store, tmp_path):
    """Ctrl-C of the flow: checkpoint, job stopped, cores free, none left; the next goes on."""
    order = training_place.order_of(store, "ended-1", epochs=400)
    flow = Flow(order, cluster, tmp_path)
    (worker,) = flow.wait("worker")
    flow.wait("step")
    began = time.monotonic()
    flow.process.send_signal(signal.SIGINT)
    flow.process.wait(120)
    print(f"\nstopped and confirmed after {time.monotonic() - began:.1f} s")
    assert f"job {order.name} is stopped" in flow.log.read_text()
    client = jobs.connect(cluster)
    assert client.get_job_status(order.name).value == "STOPPED"
    assert jobs._actors_alive(client, order.name) == 0
    assert not psutil.pid_exists(worker["pid"])
    attempts = attempts_of(LocalFolder(store / "training" / order.name))
    again = Flow(order, cluster, tmp_path)
    again.wait("worker")
    resumed = attempts_of(LocalFolder(store / "training" / order.name))
    until = time.monotonic() + 60
    while len(resumed) == len(attempts) and time.monotonic() < until:
        time.sleep(0.2)
        resumed = attempts_of(LocalFolder(store / "training" / order.name))
    assert resumed[-1].start > 0, "it goes on where it was"
    assert jobs.stop_job(client, order)
    again.process.wait(120)
    assert "was stopped" in again.log.read_text()


@pytest.mark.rest
def test_a_failing_job_carries_its_reason(cluster, store):
    """What goes wrong on a rank of the cluster is the error of the flow."""
    order = training_place.order_of(store, "failing-1", epochs=1)
    order = training_place.dataclasses.replace(order, inputs={"teacher": "nowhere"})
    with pytest.raises(TrainingError, match="nowhere"):
        jobs.train_as_job(order, cluster, listen=lambda kind, values: None)


def test_no_cluster_says_what_to_do():
    """An address where nothing answers is named, with what to check."""
    (port,) = free_ports(1)
    with pytest.raises(jobs.ClusterError, match=r"SDN_RAY_ADDRESS=http://127\.0\.0\.1"):
        jobs.connect(f"http://127.0.0.1:{port}")

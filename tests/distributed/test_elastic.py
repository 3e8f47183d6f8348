"""An elastic training on a cluster that grows and shrinks."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import training_place
from following import Flow
from ray_cluster import node, ray_cluster

from pipelines import jobs
from sdn.checkpoint import Checkpoints
from sdn.data.files import LocalFolder
from sdn.ledger import attempts_of, audit
from sdn.stage_run import keys_of

PER_EPOCH = training_place.SAMPLES // training_place.STAGE.global_batch
INTERVAL = training_place.STAGE.checkpoint_images // training_place.STAGE.global_batch


@pytest.mark.rest
@pytest.mark.timeout(600)
def test_a_training_takes_a_new_node_and_outlives_its_loss(tmp_path):
    """One rank, two when a node joins, one when it is killed; no sample lost or doubled."""
    training_place.write_store(tmp_path)
    order = dataclasses.replace(
        training_place.order_of(tmp_path, "elastic", epochs=100_000), workers=(1, 2)
    )
    place = LocalFolder(tmp_path / "training" / order.name)
    with ray_cluster(tmp_path, cpus=1) as cluster:
        flow = Flow(order, cluster.dashboard, tmp_path)

        def worlds():
            return [v["world"] for kind, v in flow.heard if kind == "worker"]

        def wait(what, check):
            until = time.monotonic() + 200
            while not check():
                assert flow.process.poll() is None, flow.log.read_text()[-3000:]
                assert time.monotonic() < until, (what, flow.log.read_text()[-3000:])
                time.sleep(0.2)

        def steps_since(count):
            starts = [n for n, (kind, _) in enumerate(flow.heard) if kind == "worker"][count:]
            return [v["step"] for k, v in flow.heard[starts[0] :] if k == "step"] if starts else []

        flow.wait("step")
        assert worlds() == [1]
        with node(cluster, tmp_path):
            wait("two ranks train", lambda: worlds() == [1, 2, 2] and steps_since(1))
        reached = steps_since(1)[-1]
        wait("one rank trains", lambda: worlds()[-1] == 1 and steps_since(3))
        assert steps_since(3)[0] >= reached - 2 * INTERVAL
        assert jobs.stop_job(jobs.connect(cluster.dashboard), order)
        flow.process.wait(120)
    attempts = attempts_of(place)
    assert [attempt.world for attempt in attempts] == [1, 2, 1]
    done = Checkpoints(place).newest().step
    found = audit(place, keys_of(tmp_path / "data", "train"), steps_per_epoch=PER_EPOCH, steps=done)
    assert (found.lost, found.twice, found.problems) == (0, 0, ())
    assert found.samples == done * training_place.STAGE.global_batch
    for before, later in itertools.pairwise(attempts):
        print(f"{before.world} -> {later.world} ranks at step {later.start}")

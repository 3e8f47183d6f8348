"""Trainings whose processes are killed, stopped and frozen from outside, at random times.

`SDN_CHAOS` is the number of faults (20 by default; `make chaos` takes 200), `SDN_CHAOS_SEED` draws
other ones. Each line printed is a fault; the last ones sum up.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import s3_server
import torch
import training_place

from pipelines.store import open_store
from sdn.checkpoint import Checkpoints
from sdn.ledger import audit
from sdn.stage_run import keys_of

ROOT = Path(__file__).parents[2]
FAULTS = int(os.environ.get("SDN_CHAOS", "20"))
SEED = int(os.environ.get("SDN_CHAOS_SEED", "0"))
STALL_S = 6
EVERY = training_place.STAGE.checkpoint_images // training_place.STAGE.global_batch
"""Steps between two checkpoints."""
KINDS = ("kill rank", "kill driver", "kill controller", "end rank", "end driver", "freeze rank")
PATIENCE_S = 240


class Driver:
    """The process that trains, and what it says."""

    def __init__(self, folder, order):
        self.folder, self.order = folder, order
        self.path = folder / f"{order.name}.json"
        self.path.write_text(json.dumps(dataclasses.asdict(order)))
        self.process = None
        self.said = []

    def start(self):
        paths = [str(ROOT), str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "chaos")]
        env = os.environ | {"SDN_CPUS": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "training_place", str(self.path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=(self.folder / f"{self.order.name}.log").open("a"),
            text=True,
        )
        self.said = []
        self.reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self.reader.start()

    def _read(self, process):
        for line in process.stdout:
            with suppress(ValueError):  # the last line of a killed process
                self.said.append(json.loads(line))

    def steps(self):
        return [values["step"] for kind, values in self.said if kind == "step"]

    def done(self):
        return any(kind == "done" for kind, _ in self.said)

    def over(self):
        return self.process is None or self.process.poll() is not None

    def ranks(self):
        """Process id of each rank of the newest attempt."""
        return {v["rank"]: v["pid"] for kind, v in self.said if kind == "worker"}

    def controller(self):
        """Process id of Ray Train's controller, among the descendants of this driver."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "TrainController" in " ".join(process.cmdline()):
                    return process.pid
            except psutil.Error:
                continue
        return None

    def log(self):
        return (self.folder / f"{self.order.name}.log").read_text()

    def wait(self, what, check):
        """Until the check holds or the driver has ended."""
        until = time.monotonic() + PATIENCE_S
        while not check() and not self.over():
            assert time.monotonic() < until, f"{self.order.name}: {what} within {PATIENCE_S} s"
            time.sleep(0.05)

    def descendants(self):
        return psutil.Process(self.process.pid).children(recursive=True)


def commit(driver, kind, draw):
    """Do one fault; the processes that may not be there afterwards, or None if it missed."""
    try:
        if kind == "kill driver":
            left = driver.descendants()
            driver.process.kill()
            return left
        if kind == "end driver":
            left = driver.descendants()
            driver.process.terminate()
            return left
        ranks = driver.ranks()
        victim = (
            driver.controller() if kind == "kill controller" else draw.choice([*ranks.values()])
        )
        number = {
            "kill rank": signal.SIGKILL,
            "kill controller": signal.SIGKILL,
            "end rank": signal.SIGTERM,
            "freeze rank": signal.SIGSTOP,
        }[kind]
        if victim is None:
            return None
        os.kill(victim, number)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return None
    return []


@dataclass(frozen=True)
class Ground:
    """Where the trainings of a test take place."""

    folder: Path
    """Their data set and what they say."""
    changes: dict
    """Of an order, where its store is not that folder."""
    epochs: float
    """Of each training; fewer where there are few faults to spread over them."""
    faults: int

    def order(self, name, ranks, stall_s=60):
        made = training_place.order_of(self.folder, name, ranks, stall_s, epochs=self.epochs)
        return dataclasses.replace(made, **self.changes)

    def steps(self):
        return round(self.epochs * training_place.SAMPLES / training_place.STAGE.global_batch)


@pytest.fixture(scope="module")
def ground(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    where, faults = request.param
    epochs = training_place.STAGE.epochs * (1 if faults > 2 else 0.2)
    if where == "folder":
        training_place.write_store(folder)
        yield Ground(folder, {}, epochs, faults)
        return
    with s3_server.running(folder) as server, pytest.MonkeyPatch().context() as patch:
        for name, value in server.keys().items():
            patch.setenv(name, value)
        uri = "s3://data/chaos"
        training_place.write_store(folder, open_store(uri, folder / "cache", server.endpoint))
        yield Ground(folder, {"store": uri, "endpoint": server.endpoint}, epochs, faults)


def weights_of(order):
    last = Checkpoints(order.place()).newest()
    assert last.step == last.steps
    return last


def undisturbed(ground, ranks):
    """The last checkpoint of a training that nothing happens to."""
    order = ground.order(f"calm-{ranks}", ranks)
    driver = Driver(ground.folder, order)
    driver.start()
    driver.wait("the end", driver.over)
    driver.reader.join(10)
    assert driver.done(), driver.log()[-3000:]
    return weights_of(order)


@pytest.mark.timeout(900 + 60 * FAULTS)
@pytest.mark.parametrize(
    ("ground", "ranks"),
    [
        pytest.param(("folder", round(FAULTS * 0.9)), 1, marks=pytest.mark.rest, id="folder-1"),
        pytest.param(("folder", round(FAULTS * 0.1)), 2, id="folder-2"),
        pytest.param(("bucket", round(FAULTS * 0.2)), 2, marks=pytest.mark.rest, id="bucket-2"),
    ],
    indirect=["ground"],
)
def test_no_fault_costs_more_than_an_interval_or_changes_the_end(ground, ranks):
    """Whatever is killed, ended or frozen: the same command goes on, at most one interval is done
    again, the ledger has each sample once an epoch, and the weights are those of a calm training,
    bit for bit.
    """
    calm = undisturbed(ground, ranks)
    draw = random.Random(f"{SEED}-{ranks}")
    # In an order drawn; with fewer faults than kinds the first of them.
    wanted = [KINDS[n % len(KINDS)] for n in range(ground.faults)]
    draw.shuffle(wanted)
    counts, lost, seconds, number = Counter(), [], [], 0
    while wanted:
        order = ground.order(f"storm-{ranks}-{number}", ranks, STALL_S)
        number += 1
        storm(ground, order, wanted, draw, counts, lost, seconds)
        check(ground, order, calm)
    print(
        f"\n{ranks} rank(s): {sum(counts.values())} faults {dict(counts)}, "
        f"{len(seconds)} recoveries in {min(seconds):.1f} to {max(seconds):.1f} s, "
        f"{sum(lost)} steps done again (at most {max(lost)} at once, interval {EVERY}), "
        "0 samples lost or doubled"
    )


def storm(ground, order, wanted, draw, counts, lost, seconds):
    """One training to its end, with faults out of `wanted` on its way."""
    driver = Driver(ground.folder, order)
    driver.start()
    while not driver.done():
        # Some steps of the present attempt, so that there is something to lose.
        known, patience = len(driver.said), draw.randrange(0, 5)

        def further(known=known, patience=patience):
            return len(driver.said) > known + patience and driver.steps()

        driver.wait("a step", further)
        time.sleep(draw.random())
        if driver.over() or not wanted:
            driver.wait("the end", driver.over)
            driver.reader.join(10)
            if not driver.done():
                driver.start()
            continue
        kind = wanted[-1]
        reached = max(driver.steps(), default=0)
        began, before = time.monotonic(), len(driver.said)
        left = commit(driver, kind, draw)
        if left is None:
            continue
        wanted.pop()
        counts[kind] += 1
        if kind.endswith("driver"):
            driver.process.wait(60)
            _, alive = psutil.wait_procs(left, timeout=30)
            assert not alive, f"left over after {kind}: {alive}"
            driver.reader.join(10)
            if driver.done():
                return
            began = time.monotonic()
            driver.start()
            before = 0

        def again(before=before):
            return driver.done() or any(k == "step" for k, _ in after(driver.said, before))

        driver.wait(f"recovery from {kind}", again)
        driver.reader.join(0.2)
        further_steps = [v["step"] for k, v in after(driver.said, before) if k == "step"]
        assert further_steps or driver.done(), driver.log()[-3000:]
        # Behind its last step a training has nothing left to do again but its "done".
        resumed = min(further_steps, default=ground.steps())
        done_again = max(0, reached - resumed)
        lost.append(done_again)
        seconds.append(time.monotonic() - began)
        print(
            f"{order.name}: {kind} at step {reached}, goes on at {resumed} "
            f"after {seconds[-1]:.1f} s"
        )
        # An interval, and what was trained while its checkpoint was being written.
        assert done_again <= 2 * EVERY, "more than an interval was done again"
    driver.process.wait(60)


def after(said, before):
    """What was said since the newest attempt behind `before` began."""
    starts = [n for n, (kind, _) in enumerate(said) if kind == "worker" and n >= before]
    return said[starts[0] :] if starts else []


def check(ground, order, calm):
    """The training ended like the calm one, and its ledger adds up."""
    last = weights_of(order)
    for name, value in calm.model.items():
        assert torch.equal(value, last.model[name]), name
    for name, value in calm.average.items():
        assert torch.equal(value, last.average[name]), name
    found = audit(
        order.place(),
        keys_of(order.dataset(), "train"),
        steps_per_epoch=training_place.SAMPLES // training_place.STAGE.global_batch,
        steps=last.steps,
    )
    assert found.problems == ()
    assert (found.lost, found.twice) == (0, 0)
    assert found.samples == training_place.SAMPLES * ground.epochs
    print(f"{order.name}: {len(found.attempts)} attempts, {found.rolled_back} steps rolled back")

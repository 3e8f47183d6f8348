"""The search under Ray Tune: stopped trials, killed processes, and what is left over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import search_place
from ray_cluster import carrying, ray_cluster

from pipelines.suggesting import suggestion
from pipelines.trials import TRIALS
from sdn.space import own_values

pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent
PATHS = [HERE.parents[1], *(HERE.parent / name for name in ("", "unit", "chaos", "distributed"))]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searches")
    search_place.write_store(folder)
    return folder


class Driver:
    """A process that runs a search, and what it said."""

    def __init__(self, store, changes, **env):
        self.log = store / f"driver-{time.monotonic_ns()}.log"
        given = [str(store), json.dumps(changes)]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "search_place.py"), *given],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))} | env,
            stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True, start_new_session=True,
        )  # fmt: skip
        self.said = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self.said.append(json.loads(line))

    def result(self):
        """What the search found, when it is over."""
        self.process.wait(480)
        self._reader.join(30)
        assert self.process.returncode == 0, self.log.read_text()[-3000:]
        return self.all("done")[0]

    def all(self, kind):
        return [values for heard, values in self.said if heard == kind]

    def until(self, true, what):
        """Wait until something is true while the process runs."""
        end = time.monotonic() + 240
        while not true():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, f"{what} was waited for in vain"
            time.sleep(0.05)

    def trials(self):
        """Processes that run a trial now."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ImplicitFunc" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def tree(self):
        return psutil.Process(self.process.pid).children(recursive=True)


def gone(tree, seconds=60):
    _, alive = psutil.wait_procs(tree, timeout=seconds)
    return not alive


def records(store, changes):
    """Name -> content of each trial's record."""
    place = search_place.ledger_of(store, changes)._files
    return {info.name: place.read(info.name) for info in place.walk(TRIALS)}


def checkpoints(store, changes):
    place = search_place.ledger_of(store, changes)._files
    return [info.name for info in place.walk("work") if "/checkpoints/" in info.name]


def check_stopped_twenty(store, changes, driver):
    """ASHA has stopped at least 20 trials, and the search holds nothing any more."""
    result = driver.result()
    (held,) = driver.all("held")
    assert held == {"groups": 0, "actors": []}
    trials = result["trials"]
    stopped = [trial for trial in trials if trial["state"] == "stopped"]
    assert len(stopped) >= 20
    assert all("behind the others at" in trial["reason"] for trial in stopped)
    assert {trial["points"][-1]["images_seen"] for trial in stopped} <= {36, 102}
    assert trials[0]["state"] == "finished"
    assert trials[0]["values"] == result["own"]
    assert {t["state"] for t in trials} == {"finished", "stopped"}
    assert checkpoints(store, changes) == []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a Ray head with two cores."""
    with ray_cluster(tmp_path_factory.mktemp("ray")) as found:
        yield found


@pytest.mark.rest
def test_nothing_is_left_on_a_cluster_after_asha_has_stopped_twenty_trials(store, cluster):
    """No placement group, no actor and no trial's process, on a cluster that goes on."""
    changes = {"search.trials": "54", "search.images": "300", "search.seed": "1"}
    check_stopped_twenty(store, changes, Driver(store, changes, SDN_RAY_ADDRESS=cluster.address))
    port = cluster.address.rpartition(":")[2]
    left = [child for own in carrying(port) for child in own.children(recursive=True)]
    assert left  # Ray's own, and its idle workers
    assert not [one for one in left if "ImplicitFunc" in " ".join(one.cmdline())]


@pytest.mark.rest
def test_nothing_is_left_here_after_asha_has_stopped_twenty_trials(store):
    """The same with Ray in this process; never more than a trial a core, with one thread each."""
    changes = {"search.trials": "54", "search.images": "300", "search.seed": "2"}
    driver = Driver(store, changes, SDN_CPUS="2")
    seen, most, tree = {}, 0, {}
    while driver.process.poll() is None:
        running = driver.trials()
        most = max(most, len(running))
        with contextlib.suppress(psutil.NoSuchProcess):
            tree |= {one.pid: one for one in driver.tree()}
        for one in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                first = seen.setdefault(one.pid, [time.monotonic(), times.user, 0.0, 0.0])
                first[2:] = [time.monotonic(), times.user]
        time.sleep(0.2)
    check_stopped_twenty(store, changes, driver)
    assert gone(tree.values())
    assert 1 <= most <= 2
    shares = [(b - a) / (t - s) for s, a, t, b in seen.values() if t - s > 5]
    assert shares
    assert max(shares) < 1.3


def test_a_killed_driver_forgets_nothing(store):
    """The next one runs exactly the configurations that remain, and changes no record."""
    changes = {"search.trials": "6", "search.images": "1200", "search.random_trials": "20"}
    first = Driver(store, changes)
    first.until(
        lambda: len({t["number"] for t in first.all("trial") if t["state"] != "running"}) >= 2,
        "the end of two trials",
    )
    tree = first.tree()
    first.process.kill()
    assert gone(tree)
    before = search_place.ledger_of(store, changes)
    contents = records(store, changes)
    ended = {t.number for t in before.all() if t.ended}
    begun = {t.number: t.values for t in before.open()}
    assert len(ended) >= 2
    assert begun
    config = search_place.run_of(store, changes).config
    remaining = begun | {
        n: suggestion(config, before.all(), n) for n in range(6) if n not in before.trials
    }
    second = Driver(store, changes)
    result = second.result()
    assert {said["number"] for said in second.all("trial")} == set(remaining)
    assert {t["number"]: t["values"] for t in result["trials"] if t["number"] in remaining} == (
        remaining
    )
    after = records(store, changes)
    assert len(after) == 6
    for number in ended:
        name = f"{TRIALS}/{number:04d}.json"
        assert after[name] == contents[name]
    for trial in before.open():  # what it had reached is neither lost nor done again
        now = result["trials"][trial.number]["points"]
        assert [p["seconds"] for p in now][: len(trial.points)] == [
            p["seconds"] for p in trial.points
        ]


@pytest.mark.rest
def test_a_killed_trial_goes_on(store):
    """A trial whose process is killed is begun again where it was, and is not failed."""
    changes = {"search.trials": "2", "search.images": "9000"}
    changes |= {"search.first_images": "300", "search.reduction": "30"}
    driver = Driver(store, changes)
    driver.until(
        lambda: {s["number"] for s in driver.all("trial") if s["images_seen"]} == {0, 1},
        "the first rung of both",
    )
    killed = driver.trials()
    for process in killed:
        process.kill()
    assert killed
    result = driver.result()
    assert [trial["state"] for trial in result["trials"]] in (
        ["finished", "finished"], ["finished", "stopped"],
    )  # fmt: skip
    assert [p["images_seen"] for p in result["trials"][0]["points"]] == [300, 9000]


@pytest.mark.rest
def test_failed_trials_have_their_reason(store):
    """Values that cannot be trained with are a failed trial; the others go on."""
    changes = {"search.trials": "6", "search.images": "300", "search.scheduler": "none"}
    changes["search.space"] = json.dumps({"image": {"low": 1, "high": 1e120}})
    driver = Driver(store, changes)
    result = driver.result()
    states = {trial["number"]: trial["state"] for trial in result["trials"]}
    assert set(states) == set(range(6))
    assert states[0] == "finished"
    failed = [trial for trial in result["trials"] if trial["state"] == "failed"]
    assert failed
    assert all("not finite" in trial["reason"] for trial in failed)
    assert result["chosen"] == 0
    told = driver.all("told")
    assert {said["where"] for said in told} == {"here"}
    assert f"trial {failed[0]['number']} failed: LossNotFiniteError" in str(told)


@pytest.mark.rest
def test_nothing_is_searched_without_the_recipes_own_values(store):
    """Where their trial fails the search ends, and the next start tries them again."""
    changes = {"search.trials": "3", "search.images": "300", "stage_two.weights.image": "1e60"}
    driver = Driver(store, changes)
    driver.process.wait(480)
    assert driver.process.returncode != 0
    said = driver.log.read_text()
    assert "the trial with the recipe's own values failed: LossNotFiniteError" in said
    assert search_place.ledger_of(store, changes).trials[0].state == "running"


@pytest.mark.rest
def test_trials_of_several_ranks(store, cluster):
    """A trial is a Ray Train run of two ranks with the score of one; ASHA's stops leave nothing."""
    changes = {"search.trials": "4", "search.images": "900", "search.workers": "2"}
    driver = Driver(store, changes, SDN_RAY_ADDRESS=cluster.address)
    result = driver.result()
    # Ray Train's own: one for the whole cluster, whoever trains there.
    assert driver.all("held") == [{"groups": 0, "actors": ["_AutoscalingCoordinatorActor"]}]
    states = [trial["state"] for trial in result["trials"]]
    assert states[0] == "finished"
    assert set(states) == {"finished", "stopped"}
    changes = {"search.trials": "1", "search.images": "900"}
    alone = search_place.alone(store, changes)
    assert result["trials"][0]["points"][-1]["images_seen"] == alone["images_seen"]
    assert result["trials"][0]["value"] == pytest.approx(alone["value"], rel=0.05)


@pytest.mark.rest
def test_population(store):
    """Members that are behind go on from others with other values; the recipe's own stay."""
    changes = {"search.trials": "4", "search.images": "1200", "search.scheduler": "pbt"}
    result = Driver(store, changes).result()
    trials = result["trials"]
    assert [trial["state"] for trial in trials] == ["finished"] * 4
    for trial in trials:
        assert [p["images_seen"] for p in trial["points"]] == [300, 600, 900, 1200]
    assert any("values" in point for trial in trials[1:] for point in trial["points"])
    assert trials[0]["values"] == result["own"]
    for trial in trials:
        for name, (low, high) in result["space"].items():
            assert low <= trial["values"][name] <= high


@pytest.mark.rest
def test_a_killed_population_goes_on(store):
    """Members go on from their last rung after the driver was killed."""
    changes = {"search.trials": "3", "search.images": "1800", "search.scheduler": "pbt"}
    changes["search.seed"] = "5"
    first = Driver(store, changes)
    first.until(
        lambda: {t["number"] for t in first.all("trial") if t["images_seen"] >= 450} == {0, 1, 2},
        "the first rung of all",
    )
    tree = first.tree()
    first.process.kill()
    assert gone(tree)
    reached = {t.number: t.images_seen for t in search_place.ledger_of(store, changes).all()}
    second = Driver(store, changes)
    result = second.result()
    assert [trial["state"] for trial in result["trials"]] == ["finished"] * 3
    for said in second.all("trial"):
        assert said["images_seen"] >= min(reached.values())


@pytest.mark.rest
def test_time_for_trials(store):
    """When the time is over what runs is stopped, and another start begins nothing."""
    changes = {"search.trials": "500", "search.images": "9000", "search.minutes": "0.4"}
    result = Driver(store, changes).result()
    trials = result["trials"]
    assert 1 < len(trials) < 500
    late = [trial for trial in trials if "search.minutes" in (trial["reason"] or "")]
    assert late
    assert {trial["state"] for trial in late} == {"stopped"}
    assert result["spent_s"] >= 20
    assert not [trial for trial in trials if trial["state"] == "running"]


@pytest.mark.rest
def test_search_of_both_stages(store):
    """Stage one, its length and its weights can be searched too."""
    changes = {"search.trials": "4", "search.images": "900", "search.stage_one": "true"}
    changes["search.space"] = json.dumps(
        {"share": {"low": 0.5, "high": 1.5}, "stage_one.conv3": {}, "conv1_2": {}, "rate": {}}
    )
    result = Driver(store, changes).result()
    config = search_place.run_of(store, changes).config
    assert result["own"] == own_values(config)
    assert set(result["own"]) == {"share", "stage_one.conv3", "conv1_2", "rate"}
    assert [t["state"] for t in result["trials"]].count("failed") == 0
    assert result["trials"][0]["points"][-1]["images_seen"] == 900


@pytest.mark.rest
def test_interrupted_search_ends_soon(store):
    """SIGINT ends all processes within 30 s; no trial is failed for it."""
    changes = {"search.trials": "300", "search.images": "1500"}
    driver = Driver(store, changes)
    driver.until(lambda: len(driver.all("trial")) > 3, "three records")
    tree = driver.tree()
    driver.process.send_signal(signal.SIGINT)
    assert gone(tree, 30)
    driver.process.wait(30)
    states = {trial.state for trial in search_place.ledger_of(store, changes).all()}
    assert "failed" not in states
    assert "running" in states

"""What Ray Tune says of its trials, and what comes of it; without a Ray."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining
from ray.tune.schedulers.trial_scheduler import TrialScheduler

from pipelines.launch import _callback, _Following
from pipelines.reasons import TrainingError
from pipelines.run import RunSpec
from pipelines.schedulers import scheduler_of
from pipelines.trials import WORK, Trial, TrialLedger
from sdn.config import with_overrides
from sdn.data.files import LocalFolder
from sdn.recipes import recipe
from sdn.trial import rungs_of

VALUES = {"conv1": 2.0, "image": 10.0}


def result(images, value=0.5, *, ended=False, seconds=2.5):
    """As a trial reports a rung, with what Tune adds of its own."""
    return {
        "images_seen": images, "value": value, "low": 0.4, "high": 0.6, "seconds": seconds,
        "parts": f"work/0000/parts-{images:012d}", "ended": ended,
        "time_total_s": 99.0, "trial_id": "tune", "config": {"number": 0},
    }  # fmt: skip


def point(images, value=0.5, seconds=2.5, **more):
    kept = ("images_seen", "value", "low", "high", "seconds", "parts")
    found = result(images, value, seconds=seconds)
    return {name: found[name] for name in kept} | more


def passed(*given, **more):
    """A point that is not the last: nothing is compared with it."""
    return {name: value for name, value in point(*given, **more).items() if name != "parts"}


def nobody(trial):
    pass


def begin(place, count=1, listen=nobody, left_s=None):
    """A ledger with trials that have begun, and who follows them: number n is t{n} to Tune."""
    ledger = TrialLedger(place)
    for number in range(count):
        if number not in ledger.trials:
            ledger.write(Trial(number=number, values=dict(VALUES)))
    following = _Following(ledger, listen, left_s)
    for number in range(count):
        following.begun(f"t{number}", number)
    return following


def read(place):
    """The trials as another process finds them."""
    return TrialLedger(place).all()


@pytest.fixture
def place(tmp_path):
    return LocalFolder(tmp_path)


def test_every_rung_is_written_before_it_is_told(place):
    """Each rung is in the ledger, with what is kept of it, when the listener hears of it."""
    heard = []

    def listen(trial):
        assert read(place)[trial.number] == trial
        heard.append((trial.number, trial.state, trial.images_seen))

    following = begin(place, 2, listen)
    following.heard("t0", result(100, 0.7), VALUES)
    following.heard("t1", result(104, 0.8), VALUES)
    following.heard("t0", result(300, 0.5, ended=True), VALUES)
    assert heard == [(0, "running", 100), (1, "running", 104), (0, "finished", 300)]
    first, second = read(place)
    assert first.points == [passed(100, 0.7), point(300)]
    assert (second.state, second.points, second.reason) == ("running", [point(104, 0.8)], None)


def test_time_is_counted_over_all_attempts(place):
    """The time of earlier attempts is not forgotten."""
    TrialLedger(place).spend(1000.0)
    begin(place).heard("t0", result(100), VALUES)
    assert TrialLedger(place).spent_s >= 1000


def test_a_rung_heard_again_keeps_its_seconds(place):
    """After a restart a trial says its last rung again, in no time: its first seconds stay."""
    begin(place).heard("t0", result(100, seconds=7.5), VALUES)
    following = begin(place)
    following.heard("t0", result(100, 0.5, seconds=0.0), VALUES)
    following.heard("t0", result(300, 0.4, seconds=9.0, ended=True), VALUES)
    (trial,) = read(place)
    assert trial.points == [passed(100, seconds=7.5), point(300, 0.4, seconds=9.0)]
    assert trial.seconds == 16.5


def test_values_that_cannot_be_trained_with(place):
    """A trial that says why it failed is failed for that reason, and what Tune adds is ignored."""
    following = begin(place, 2)
    following.heard("t1", result(100), VALUES)
    following.heard("t1", {"failed": "LossNotFiniteError: step 3", "trial_id": "t1"}, VALUES)
    following.over("t1", None)
    _, trial = read(place)
    assert (trial.state, trial.reason) == ("failed", "LossNotFiniteError: step 3")
    assert trial.points == [point(100)]


@pytest.mark.parametrize("end", [{"failed": "LossNotFiniteError: step 3"}, OSError("no node")])
def test_without_the_recipes_own_trial_the_search_ends(place, end):
    """Its failure is an error, and its record stays open, for the next start to try again."""
    following = begin(place, 2)
    if isinstance(end, dict):
        following.heard("t0", end, VALUES)
        following.over("t0", None)  # as Tune then says
    else:
        following.over("t0", end)
    with pytest.raises(
        TrainingError, match=r"with the recipe's own values failed: (LossNotFinite|OS)Error: "
    ):
        following.check()
    assert [trial.state for trial in read(place)] == ["running", "running"]


def test_what_is_nobodys_values_ends_the_search(place):
    """A full disk or damaged data would end every trial: no record says that one has failed."""
    following = begin(place, 2)
    following.heard("t1", {"broken": "the disk is full"}, VALUES)
    with pytest.raises(TrainingError, match="a trial could not be run: the disk is full"):
        following.check()
    assert [trial.state for trial in read(place)] == ["running", "running"]


@pytest.mark.parametrize(
    ("points", "error", "left_s", "state", "words"),
    [
        ([(100, False)], None, None, "stopped", "behind the others at 100 images seen"),
        ([(1200, False)], None, 1e9, "stopped", "behind the others at 1,200 images seen"),
        ([], None, None, "failed", "without a score"),
        ([], None, -1.0, "stopped", "search.minutes"),
        ([(100, False)], None, -1.0, "stopped", "search.minutes"),
        ([(100, False)], OSError("the node is gone"), None, "failed", "OSError: the node is gone"),
        ([], ValueError("wrong"), -1.0, "failed", "ValueError: wrong"),
        ([(320, True)], None, -1.0, "finished", None),
        ([(320, True)], RuntimeError("too late"), None, "finished", None),
    ],
)
def test_tune_is_done_with_a_trial(place, points, error, left_s, state, words):
    """How a trial ended is told by what it had reached, by its error and by the time."""
    following = begin(place, 2, left_s=left_s)
    for images, ended in points:
        following.heard("t1", result(images, ended=ended), VALUES)
    following.over("t1", error)
    _, trial = read(place)
    assert trial.state == state
    assert len(trial.points) == len(points)
    assert (trial.reason is None) if words is None else (words in trial.reason)


@pytest.mark.parametrize("left_s", [None, 1e9, -1.0])
def test_when_the_time_is_over_nothing_stays_open(place, left_s):
    """At the end what is open is stopped if the time is over, and is else gone on with later."""
    following = begin(place, 3, left_s=left_s)
    following.heard("t1", result(320, ended=True), VALUES)
    following.end()
    late = left_s == -1.0
    state = "stopped" if late else "running"
    assert following.late() == late
    assert [trial.state for trial in read(place)] == [state, "finished", state]
    assert all("search.minutes" in t.reason for t in read(place) if t.state == "stopped")


def test_after_closing_nothing_is_written(place):
    """What comes when Ray is being ended changes no record and is not told."""
    heard = []
    following = begin(place, 2, heard.append)
    following.heard("t0", result(100), VALUES)
    before = read(place)
    following.close()
    following.heard("t0", result(300, ended=True), VALUES)
    following.over("t1", RuntimeError("the worker died"))
    following.heard("t1", {"failed": "something"}, VALUES)
    assert read(place) == before
    assert len(heard) == 1
    following.check()


def test_a_trial_that_is_not_known_is_left_alone(place):
    """An event of a trial that was never begun here changes nothing."""
    following = begin(place)
    before = read(place)
    following.heard("stranger", result(100), VALUES)
    following.over("stranger", None)
    assert read(place) == before


class Full(LocalFolder):
    """A folder on a disk that is full from some point on."""

    full = False

    def write(self, name, data):
        if self.full:
            raise OSError(28, "No space left on device")
        super().write(name, data)


def test_a_ledger_that_cannot_be_written_ends_the_search(tmp_path):
    """The error reaches the main thread, whatever Tune makes of it, and nothing is told."""
    place, heard = Full(tmp_path), []
    following = begin(place, 1, heard.append)
    following.check()
    place.full = True
    with contextlib.suppress(OSError):
        following.heard("t0", result(100), VALUES)
    with pytest.raises(OSError, match="No space left"):
        following.check()
    assert heard == []
    assert read(LocalFolder(tmp_path))[0].points == []


def test_an_ended_trial_keeps_no_checkpoint(place):
    """What an ended trial would have gone on from is removed, its parts and others' are not."""
    following = begin(place, 2)
    names = [f"{WORK}/{n:04d}/stage_two/checkpoints/step-000000009/state.pt" for n in (0, 1)]
    parts = f"{WORK}/0000/parts-000000000100"
    for name in (*names, parts):
        place.write(name, b"some")
    following.heard("t0", result(100), VALUES)
    assert place.exists(names[0])
    following.over("t0", None)
    assert not place.exists(names[0])
    assert place.exists(names[1])
    assert place.exists(parts)


def test_members_of_a_population_keep_their_numbers(place):
    """A member that takes over another's config, its number too, is noted under its own number."""
    following = begin(place, 2)
    following.heard("t1", result(80), VALUES)
    following.begun("t1", 0)
    changed = {"conv1": 2.4, "image": 8.0}
    following.heard("t1", result(160, 0.4), changed)
    following.heard("t1", result(240, 0.3, ended=True), changed)
    first, second = read(place)
    assert first.points == []
    assert second.values == changed
    assert second.points == [passed(80), passed(160, 0.4, values=changed), point(240, 0.3)]


def tune_trial(number, *, error=None):
    """As Tune has it."""
    config = {"number": number, "values": VALUES}
    return SimpleNamespace(trial_id=f"t{number}", config=config, get_error=lambda: error)


def test_the_callback_hands_events_on(place):
    """Start, result, end and error of Tune's trials are in the ledger."""
    ledger = TrialLedger(place)
    for number in range(4):
        ledger.write(Trial(number=number, values=dict(VALUES)))
    callback = _callback(_Following(ledger, nobody))
    trials = [tune_trial(n, error=ValueError("no") if n == 2 else None) for n in range(4)]
    for trial in trials:
        callback.on_trial_start(1, trials, trial)
        callback.on_trial_result(2, trials, trial, result(100))
    callback.on_trial_result(3, trials, trials[0], result(300, ended=True))
    callback.on_trial_complete(3, trials, trials[0])
    callback.on_trial_complete(3, trials, trials[1])
    callback.on_trial_error(3, trials, trials[2])
    callback.on_trial_error(3, trials, trials[3])
    found = read(place)
    assert [trial.state for trial in found] == ["finished", "stopped", "failed", "failed"]
    assert found[2].reason == "ValueError: no"
    assert "its process was lost" in found[3].reason


def test_what_listens_is_not_kept_with_the_experiment(place):
    """Tune pickles its callbacks: what listens may hold a lock, is left out, and still hears."""
    heard, lock = [], threading.Lock()

    def listen(trial):
        with lock:
            heard.append(trial.images_seen)

    class Holding(LocalFolder):
        def __reduce__(self):
            raise TypeError("cannot pickle a client")

    callback = _callback(begin(Holding(place.path), 1, listen))
    copied = cloudpickle.loads(cloudpickle.dumps(callback))
    assert heard == []
    assert not any(value is listen for value in vars(copied).values())
    callback.on_trial_result(1, [], tune_trial(0), result(100))
    assert heard == [100]


def test_who_follows_is_pickled_without_ledger_and_listener(place):
    """Of the object that writes the ledger a copy has nothing to write with."""
    following = begin(place, 1, threading.Lock().acquire)
    assert vars(cloudpickle.loads(cloudpickle.dumps(following))) == {"_open": False}


def config_of(**search):
    changes = {f"search.{name}": json.dumps(value) for name, value in search.items()}
    return with_overrides(recipe("tiny"), {"search.images": "900"} | changes)


def run_live(scheduler, scores, config, first=0):
    """Let trials report one after the other; the ledger's records of what became of them."""
    trials = []
    for number, values in enumerate(scores, first):
        about = SimpleNamespace(trial_id=f"live-{number}", config={"number": number})
        trial = Trial(number=number, values=VALUES, state="finished")
        scheduler.on_trial_add(None, about)
        for images, value in zip(rungs_of(config.search), values, strict=True):
            said = result(images + 4, value)
            trial.add(point(images + 4, value))
            if scheduler.on_trial_result(None, about, said) == TrialScheduler.STOP:
                trial.state = "finished" if images == config.search.images else "stopped"
                scheduler.on_trial_complete(None, about, said)
                break
        trials.append(trial)
    return trials


def decision(scheduler, images, value, number=99):
    """What a trial is told that has come to this rung; the scheduler stays as it was."""
    scheduler = copy.deepcopy(scheduler)
    about = SimpleNamespace(trial_id=f"asks-{number}", config={"number": number})
    scheduler.on_trial_add(None, about)
    return scheduler.on_trial_result(None, about, result(images, value))


SCORES = [[0.5, 0.4, 0.3]] + [
    [0.1 * ((7 * n) % 10), 0.09 * ((7 * n) % 10), 0.08 * ((3 * n) % 10)] for n in range(1, 10)
]


@pytest.mark.parametrize("score", ["kid", "retrieval"])
def test_a_search_gone_on_with_decides_as_if_it_had_never_stopped(place, score):
    """Told of the ended trials of the ledger, ASHA decides as one that has seen them live."""
    config = config_of(score=score)
    live = scheduler_of(config, TrialLedger(place))
    ledger = TrialLedger(place)
    for trial in run_live(live, SCORES, config):
        ledger.write(trial)
    assert {trial.state for trial in ledger.all()} == {"finished", "stopped"}
    replayed = scheduler_of(config, TrialLedger(place))
    probes = [(images, n / 40) for images in rungs_of(config.search) for n in range(40)]
    told = [decision(live, *probe) for probe in probes]
    assert [decision(replayed, *probe) for probe in probes] == told
    assert set(told) == {TrialScheduler.CONTINUE, TrialScheduler.STOP}
    fresh = scheduler_of(config, TrialLedger(LocalFolder(place.path / "other")))
    assert [decision(fresh, *probe) for probe in probes] != told


@pytest.mark.parametrize("score", ["kid", "retrieval"])
def test_the_recipes_own_values_run_to_the_end(place, score):
    """Number 0 goes on at every rung but the last, however far it is behind; others stop."""
    config = config_of(score=score)
    scheduler = scheduler_of(config, TrialLedger(place))
    run_live(scheduler, [[0.1] * 3, [0.1] * 3, [0.2] * 3], config, 1)
    worst = 9.0 if score == "kid" else -9.0
    first, second, last = rungs_of(config.search)
    for images in (first, second):
        assert decision(scheduler, images, worst, 0) == TrialScheduler.CONTINUE
        assert decision(scheduler, images, worst, 5) == TrialScheduler.STOP
    assert decision(scheduler, last, worst, 0) == TrialScheduler.STOP


def test_failed_and_open_trials_are_replayed(place):
    """What failed later was at its rungs; an open trial will say its last rung itself."""
    config, ledger = config_of(), TrialLedger(place)
    good = [point(100, 0.001), point(300, 0.001)]
    ledger.write(Trial(number=1, values=VALUES, state="running", points=good[:1]))
    assert decision(scheduler_of(config, ledger), 100, 9.0) == TrialScheduler.CONTINUE
    ledger.write(Trial(number=1, values=VALUES, state="running", points=good))
    assert decision(scheduler_of(config, ledger), 100, 9.0) == TrialScheduler.STOP
    ledger.write(Trial(number=1, values=VALUES, state="failed", points=good[:1]))
    assert decision(scheduler_of(config, ledger), 100, 9.0) == TrialScheduler.STOP


def test_a_trial_that_failed_is_not_judged(place):
    """A report without a score, as of a trial that failed, stops nothing."""
    scheduler = scheduler_of(config_of(), TrialLedger(place))
    about = SimpleNamespace(trial_id="one", config={"number": 1})
    scheduler.on_trial_add(None, about)
    said = scheduler.on_trial_result(None, about, {"failed": "ValueError: no"})
    assert said == TrialScheduler.CONTINUE


def test_other_schedulers(place):
    """Without ASHA all run to the end, or change their values on the way."""
    ledger = TrialLedger(place)
    assert isinstance(scheduler_of(config_of(scheduler="none"), ledger), FIFOScheduler)
    found = scheduler_of(config_of(scheduler="pbt"), ledger)
    assert isinstance(found, PopulationBasedTraining)


def test_a_rank_of_a_trial_needs_a_core(monkeypatch, tmp_path):
    """More ranks than cores are refused before anything starts; on a cluster nobody knows yet."""
    monkeypatch.setenv("SDN_CPUS", "2")
    spec = RunSpec("tiny", {"search.workers": "16"}, str(tmp_path))
    with pytest.raises(ValueError, match=r"search.workers=16: .* there are 2"):
        spec.open()
    assert RunSpec("tiny", {"search.workers": "2"}, str(tmp_path)).open().config.search.workers == 2
    monkeypatch.setenv("SDN_RAY_ADDRESS", "127.0.0.1:6379")
    assert spec.open().config.search.workers == 16

"""Which values are tried next, out of the seed, the number and the trials so far."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from optuna.trial import TrialState
from ray import cloudpickle
from ray.tune.search import Searcher

from pipelines.suggesting import ledger_searcher, study_of, suggestion
from pipelines.trials import Trial, TrialLedger
from sdn.config import SearchConfig, with_overrides
from sdn.data.files import LocalFolder
from sdn.recipes import recipe
from sdn.space import own_values, space_of


def config_of(**search):
    changes = {f"search.{name}": json.dumps(value) for name, value in search.items()}
    return with_overrides(recipe("tiny"), changes)


CONFIG = config_of(trials=40, random_trials=3)
SPACE = space_of(CONFIG)


def point(images, value):
    return {"images_seen": images, "value": value, "low": 0.0, "high": 1.0, "seconds": 1.0}


def distance(values):
    """Squared, in decades, from a point of the space that is not its middle."""
    return sum(
        (math.log10(values[name] / low) / math.log10(high / low) - 0.8) ** 2
        for name, (low, high) in SPACE.items()
    )


def tried(number, state="finished", images=320):
    """A trial with random values whose score is their distance."""
    values = suggestion(CONFIG, [], min(number, 3))
    values = {name: value * (1 + number / 100) for name, value in values.items()}
    points = [] if state == "failed" else [point(images, distance(values))]
    return Trial(number=number, values=values, state=state, points=points)


TRIED = [tried(n) for n in range(6)]


def test_the_first_has_the_recipes_own_values():
    """Number 0 has the recipe's own values, whatever was tried and whatever the seed."""
    for seed in (0, 1):
        config = config_of(seed=seed)
        assert suggestion(config, TRIED, 0) == suggestion(config, [], 0) == own_values(config)


@pytest.mark.parametrize("number", [1, 3, 4, 20])
def test_a_suggestion_is_a_function_of_seed_number_and_trials(number):
    """Asked twice it is the same; another seed or number gives other values."""
    first = suggestion(CONFIG, TRIED, number)
    assert suggestion(CONFIG, TRIED, number) == first
    assert first.keys() == SPACE.keys()
    other = dataclasses.replace(CONFIG, search=dataclasses.replace(CONFIG.search, seed=1))
    assert suggestion(other, TRIED, number) != first
    assert suggestion(CONFIG, TRIED, number + 1) != first


def test_another_process_suggests_the_same():
    """Nothing of a process, its hash seed say, enters into a suggestion."""
    program = (
        "import json, sys, test_suggesting as t\n"
        "print(json.dumps([t.suggestion(t.CONFIG, t.TRIED, n) for n in (2, 7)]))"
    )
    here = Path(__file__).parent
    env = {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parents[1]))), "PYTHONHASHSEED": "7"}
    said = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | env, capture_output=True, check=True
    ).stdout
    assert json.loads(said) == [suggestion(CONFIG, TRIED, n) for n in (2, 7)]


@pytest.mark.parametrize("trials", [[], TRIED], ids=["none", "six"])
def test_values_lie_in_the_space(trials):
    """Whatever is suggested lies within its range."""
    for number in range(1, 40):
        for name, value in suggestion(CONFIG, trials, number).items():
            low, high = SPACE[name]
            assert low <= value <= high, (number, name)


def test_random_ones_do_not_depend_on_the_trials():
    """Up to search.random_trials what was found changes nothing; beyond it does."""
    for number in (1, 2, 3):
        assert suggestion(CONFIG, TRIED, number) == suggestion(CONFIG, [], number)
    assert suggestion(CONFIG, TRIED, 4) != suggestion(CONFIG, [], 4)
    worse = [dataclasses.replace(t, points=[point(320, -distance(t.values))]) for t in TRIED]
    assert suggestion(CONFIG, worse, 4) != suggestion(CONFIG, TRIED, 4)


def test_a_population_starts_at_random():
    """Members of a population are drawn each from its number alone."""
    config = config_of(trials=40, random_trials=3, scheduler="pbt")
    assert suggestion(config, TRIED, 30) == suggestion(config, [], 30)


def test_what_runs_is_not_asked_for_again():
    """Two at a time are not the same: one that runs changes what is suggested, and is not met."""
    running = Trial(number=6, values=suggestion(CONFIG, TRIED, 6))
    assert suggestion(CONFIG, [*TRIED, running], 7) != running.values
    assert suggestion(CONFIG, [*TRIED, running], 7) != suggestion(CONFIG, TRIED, 7)


@pytest.mark.parametrize("score", ["kid", "retrieval"])
def test_it_learns(score):
    """In 40 trials one after the other the sampler comes nearer to the best than chance does."""
    sign = 1 if score == "kid" else -1
    config = config_of(trials=40, random_trials=8, score=score)
    trials = []
    for number in range(40):
        values = suggestion(config, trials, number)
        found = [point(320, sign * distance(values))]
        trials.append(Trial(number=number, values=values, state="finished", points=found))
    chance = [suggestion(config_of(random_trials=40), [], number) for number in range(1, 40)]
    learnt = sorted(distance(trial.values) for trial in trials)
    drawn = sorted(map(distance, chance))
    assert learnt[0] < drawn[0]
    assert sum(learnt[:10]) < 0.7 * sum(drawn[:10])


def test_trials_as_a_study():
    """Each state has Optuna's own; one that was stopped before any score counts as failed."""
    trials = [
        tried(0),
        dataclasses.replace(tried(1, "stopped", 100), points=[point(36, 0.9), point(108, 0.8)]),
        dataclasses.replace(tried(2, "stopped"), points=[]),
        tried(3, "failed"),
        dataclasses.replace(tried(4, "running"), points=[]),
        dataclasses.replace(tried(5, "running"), points=[point(36, 0.4)]),
    ]
    study = study_of(trials, SPACE, SearchConfig())
    assert [one.state for one in study.trials] == [
        TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL,
        TrialState.RUNNING, TrialState.RUNNING,
    ]  # fmt: skip
    assert [one.user_attrs["number"] for one in study.trials] == list(range(6))
    assert study.trials[0].value == trials[0].value
    assert study.trials[1].intermediate_values == {36: 0.9, 108: 0.8}
    assert [one.params for one in study.trials] == [one.values for one in trials]
    assert suggestion(CONFIG, trials, 6).keys() == SPACE.keys()


@pytest.mark.parametrize(("score", "best"), [("kid", 0.1), ("retrieval", 0.9)])
def test_the_study_knows_which_direction_is_better(score, best):
    """KID is an error, the reciprocal rank is a score."""
    trials = [
        Trial(number=n, values=own_values(CONFIG), state="finished", points=[point(320, value)])
        for n, value in enumerate((0.1, 0.9, 0.5))
    ]
    assert study_of(trials, SPACE, SearchConfig(score=score)).best_value == best


def test_values_outside_the_space_are_brought_to_its_edge():
    """A population's values may leave their ranges on the way; Optuna takes the nearest ones."""
    far = {name: high * 2 for name, (_, high) in SPACE.items()} | {"conv1": 1e-9}
    trial = Trial(number=0, values=far, state="finished", points=[point(320, 0.1)])
    (found,) = study_of([trial], SPACE, SearchConfig()).trials
    assert found.params == {n: high for n, (_, high) in SPACE.items()} | {
        "conv1": SPACE["conv1"][0]
    }


def test_the_searcher_gives_open_ones_first(tmp_path):
    """What was begun comes first with its values, then new numbers up to the end, then no more."""
    config = config_of(trials=6, random_trials=3)
    ledger = TrialLedger(LocalFolder(tmp_path))
    for trial in (
        TRIED[0],
        dataclasses.replace(TRIED[1], state="running", points=[]),
        tried(2, "failed"),
        dataclasses.replace(TRIED[4], state="running"),
    ):
        ledger.write(trial)
    searcher, given = ledger_searcher(config, ledger), []
    while (found := searcher.suggest(f"tune-{len(given)}")) != Searcher.FINISHED:
        on_disk = TrialLedger(LocalFolder(tmp_path)).trials[found["number"]]
        assert on_disk.values == found["values"]
        assert on_disk.state == "running"
        given.append(found)
    assert [one["number"] for one in given] == [1, 4, 3, 5]
    assert [one["values"] for one in given[:2]] == [TRIED[1].values, TRIED[4].values]
    assert searcher.suggest("again") == Searcher.FINISHED
    for trial in ledger.all():  # each from what was known before it
        if trial.number in {3, 5}:
            before = [t for t in ledger.all() if t.number < trial.number or t.number == 4]
            assert trial.values == suggestion(config, before, trial.number)


def test_a_searcher_begun_again_goes_on_where_the_first_was(tmp_path):
    """Two searchers one after the other suggest what one alone would have."""
    config = config_of(trials=6, random_trials=3)

    def given(place, *counts):
        found = []
        for count in counts:
            ledger = TrialLedger(LocalFolder(tmp_path / place))
            searcher = ledger_searcher(config, ledger)
            for number in range(count):
                one = searcher.suggest(str(number))
                trial = ledger.trials[one["number"]]
                trial.state, trial.points = "finished", [point(320, distance(one["values"]))]
                ledger.write(trial)
                found.append(one)
        return found

    assert given("two", 3, 3) == given("one", 6)


def test_a_searcher_that_cannot_write_suggests_nothing(tmp_path):
    """A suggestion that is not in the ledger is not given out."""

    class Full(LocalFolder):
        def write(self, name, _data):
            raise OSError(28, "No space left on device", name)

    searcher = ledger_searcher(CONFIG, TrialLedger(Full(tmp_path)))
    with pytest.raises(OSError, match="No space left"):
        searcher.suggest("one")


def test_a_searcher_is_pickled_without_its_ledger(tmp_path):
    """Tune pickles the searcher with the experiment; a place that holds a client is left out."""

    class Holding(LocalFolder):
        def __reduce__(self):
            raise TypeError("cannot pickle a client")

    ledger = TrialLedger(Holding(tmp_path))
    ledger.write(TRIED[0])
    searcher = ledger_searcher(CONFIG, ledger)
    assert isinstance(cloudpickle.loads(cloudpickle.dumps(searcher)), Searcher)
    assert searcher.suggest("after")["number"] == 1

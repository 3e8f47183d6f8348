"""A trial of a search: where it is looked at, what it learns, and where it goes on."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import tiny_data
import torch
from evaluated import config_of, make_inputs

import sdn.trial
from sdn.checkpoint import Checkpoints
from sdn.config import Range, SearchConfig, StageConfig
from sdn.data.files import LocalFolder
from sdn.space import own_values, with_values
from sdn.stage_run import images_of, new_student, open_stage, stage_plan, write_model
from sdn.trainer import Trainer
from sdn.training import LossNotFiniteError
from sdn.trial import first_rung, run_trial, rungs_of, trial_config

SAMPLES = 10
SEEN = [4, 8, 10, 14, 18, 20, 24, 28]
"""Images seen after each step on 10 images in batches of 4."""


class Ended(Exception):  # noqa: N818 (what a scheduler raises is no error)
    """A scheduler ends the trial."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """10 training images, a teacher and a caption encoder."""
    return make_inputs(tmp_path_factory.mktemp("trial"), tiny_data.records(SAMPLES, 2))


def searching(**changes):
    """A run whose trials see 25 images, looked at from 5 on at each doubling."""
    search = {"images": 25, "first_images": 5, "reduction": 2.0} | changes
    stage = StageConfig(
        global_batch=4, rate=1e-3, precision="float32", schedule="one-cycle", average_share=0.3
    )
    # The share of the stages is read, their length is not.
    return config_of(
        stage_one=dataclasses.replace(stage, epochs=50, seed=3),
        stage_two=dataclasses.replace(stage, epochs=50, rate=2e-3),
        search=SearchConfig(**search),
        lanes=4,
    )


def look_of(point):
    return (point.stage, point.images_seen, point.done)


def looked_at(config, inputs, resume=None):
    """What `reached` was called with, and weights and checkpoint of each time."""
    found = []

    def reached(point):
        found.append((look_of(point), point.weights(), point.checkpoint()))

    run_trial(config, inputs, reached, resume=resume)
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("changes", "rungs"),
    [
        ({"scheduler": "asha"}, [100, 300, 900]),
        ({"scheduler": "asha", "images": 901}, [101, 303, 901]),
        ({"scheduler": "asha", "images": 905}, [101, 303, 905]),
        ({"scheduler": "asha", "first_images": 300, "reduction": 1.5}, [300, 450, 675, 900]),
        ({"scheduler": "asha", "first_images": 900}, [900]),
        ({"scheduler": "asha", "images": 2}, [1, 2]),
        ({"scheduler": "pbt"}, [225, 450, 675, 900]),
        ({"scheduler": "pbt", "images": 902}, [226, 452, 678, 902]),
        ({"scheduler": "pbt", "first_images": 400}, [400, 800, 900]),
        ({"scheduler": "none"}, [900]),
        ({"scheduler": "none", "first_images": 7}, [900]),
    ],
)
def test_rungs(changes, rungs):
    """asha: a ninth, each rung so many times as long; pbt: every quarter; none: only the end."""
    search = SearchConfig(**{"images": 900} | changes)
    assert rungs_of(search) == rungs
    if search.scheduler != "none":
        assert first_rung(search) == rungs[0]


@pytest.mark.parametrize("reduction", [1.01, 1.5, 2.0, 3.0, 100.0])
@pytest.mark.parametrize("scheduler", ["asha", "pbt", "none"])
def test_rungs_end_with_the_whole_length(scheduler, reduction):
    """Of any search the rungs never fall, the last is its length, and no other reaches it."""
    for images in (1, 5, 37, 8_000):
        rungs = rungs_of(SearchConfig(scheduler=scheduler, images=images, reduction=reduction))
        assert rungs == sorted(rungs)
        assert rungs[-1] == images
        assert all(0 < rung < images for rung in rungs[:-1])


def test_a_trial_has_the_searchs_length():
    """Without stage one all images are stage two's; with it they are parted as the run's are."""
    config = searching()
    alone = trial_config(config, SAMPLES)
    assert (alone.stage_one.epochs, alone.stage_two.epochs) == (0, 2.5)
    assert alone.stage_two.rate == config.stage_two.rate
    parted = trial_config(with_values(searching(stage_one=True), {"share": 0.2}), SAMPLES)
    assert parted.stage_one.epochs == pytest.approx(0.5)
    assert parted.stage_two.epochs == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [8, 10, 20, 28]),  # 5, 10, 20
        ({"first_images": 4, "reduction": 1.5}, [4, 8, 10, 14, 24, 28]),  # 4, 6, 9, 13.5, 20.25
        ({"first_images": 1}, [4, 8, 18, 28]),  # 1, 2 and 4 at once, 8, 16
        ({"scheduler": "pbt"}, [8, 10, 18, 20, 28]),  # 5, 10, 15, 20
        ({"scheduler": "none"}, [28]),
    ],
)
def test_it_is_looked_at_where_a_rung_is_reached(inputs, changes, expected):
    """At the first border between batches at or after each rung, once, and at the end."""
    found = looked_at(searching(**changes), inputs)
    assert [look for look, _, _ in found] == [
        ("stage_two", seen, seen == SEEN[-1]) for seen in expected
    ]
    assert [state.images_seen for _, _, state in found] == expected
    assert {state.steps for _, _, state in found} == {8}  # the schedule's length is the trial's


def test_both_stages_are_counted_as_one_length(inputs):
    """With stage one, rungs and images seen count over both, and one on their border is not lost.

    Four steps of each stage: 14 images each.
    """
    config = searching(stage_one=True, images=24, first_images=6, reduction=1.5)
    assert rungs_of(config.search) == [6, 9, 14, 21, 24]
    found = looked_at(config, inputs)
    assert [look for look, _, _ in found] == [
        ("stage_one", 8, False),
        ("stage_one", 10, False),
        ("stage_one", 14, False),
        ("stage_two", 22, False),
        ("stage_two", 28, True),
    ]
    assert [state.images_seen for _, _, state in found] == [8, 10, 14, 8, 14]
    end = found[2][1]
    assert not same(end, new_student(config).state_dict())


def test_stage_two_goes_on_from_the_trials_own_stage_one(inputs, monkeypatch):
    """Where stage one is searched, stage two starts from the weights that it ended with."""
    starts = []

    class Recording(Trainer):
        def __init__(self, stage, student, *arguments, **more):
            starts.append({k: v.clone() for k, v in student.state_dict().items()})
            super().__init__(stage, student, *arguments, **more)

    monkeypatch.setattr("sdn.stage_run.Trainer", Recording)
    config = searching(stage_one=True, images=24, first_images=14)
    found = looked_at(config, inputs)
    assert found[0][0] == ("stage_one", 14, False)
    assert same(starts[0], new_student(config).state_dict())
    assert same(starts[1], found[0][1])


@pytest.mark.parametrize(
    ("name", "stage_one", "factor"),
    [
        ("conv2", False, 5),
        ("conv3_2", False, 5),
        ("rate", False, 2),
        ("stage_one.image", True, 5),
        pytest.param("stage_one.rate", True, 2, marks=pytest.mark.rest),
        ("share", True, 1.5),
    ],
)
def test_another_value_trains_another_student(inputs, name, stage_one, factor):
    """Each value that is searched changes the weights; the same values give the same, bit by bit.

    `factor` is on the run's own value.
    """
    base = searching(stage_one=stage_one, scheduler="none", space={name: Range()})
    own = own_values(base)[name]
    ends = [
        looked_at(with_values(base, {name: value}), inputs)[-1][1]
        for value in (own, own, own * factor)
    ]
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])
    assert all(value.isfinite().all() for value in ends[2].values())


@pytest.mark.parametrize(
    ("stage_one", "rung"),
    [
        (False, 0),
        (False, 2),
        pytest.param(False, 1, marks=pytest.mark.rest),
        (True, 0),
        (True, 2),
        (True, 3),
        pytest.param(True, 1, marks=pytest.mark.rest),
    ],
)
def test_resumed_is_bit_for_bit_the_uninterrupted(inputs, tmp_path, whole, stage_one, rung):
    """From a rung's checkpoint on disk a trial reports that rung again and ends the very same."""
    config, expected = whole[stage_one]
    (stage, seen, _), _, state = expected[rung]
    assert 0 < seen < 28
    Checkpoints(LocalFolder(tmp_path)).save(state)
    torch.manual_seed(99)  # nothing may depend on the global generator
    found = looked_at(config, inputs, (stage, Checkpoints(LocalFolder(tmp_path)).newest()))
    assert [look for look, _, _ in found] == [look for look, _, _ in expected[rung:]]
    for (_, weights, again), (_, first, before) in zip(found, expected[rung:], strict=True):
        assert same(weights, first)
        assert same(again.model, before.model)
        assert (again.step, again.images_seen) == (before.step, before.images_seen)


@pytest.fixture(scope="module")
def whole(inputs):
    """Whether stage one is trained too -> config, and what an uninterrupted trial reports."""
    configs = {
        False: searching(),
        True: searching(stage_one=True, images=24, first_images=6, reduction=1.5),
    }
    return {both: (config, looked_at(config, inputs)) for both, config in configs.items()}


def test_what_is_resumed_says_its_rung_first_and_costs_nothing(inputs, whole):
    """The rung gone on from is told again before anything is trained, at no time of its own."""
    config, expected = whole[False]
    told = []

    def reached(point):
        told.append((look_of(point), point.seconds, point.checkpoint().step))
        raise Ended

    with pytest.raises(Ended):
        run_trial(config, inputs, reached, resume=("stage_two", expected[1][2]))
    assert told == [(("stage_two", 10, False), 0.0, 3)]


def test_a_trial_resumed_at_its_end_only_says_so(inputs, whole):
    """A checkpoint of the end is reported as the end again, and nothing is trained."""
    config, expected = whole[False]
    found = looked_at(config, inputs, ("stage_two", expected[-1][2]))
    assert [look for look, _, _ in found] == [("stage_two", 28, True)]
    assert same(found[0][1], expected[-1][1])


def test_an_exception_from_reached_ends_it(inputs):
    """What `reached` raises comes out as it is, and nothing is trained or reported after it."""
    told = []

    def reached(point):
        told.append(look_of(point))
        if len(told) == 2:
            raise Ended("behind the others")

    with pytest.raises(Ended, match="behind the others"):
        run_trial(searching(), inputs, reached)
    assert told == [("stage_two", 8, False), ("stage_two", 10, False)]


def test_weights_of_a_rung_stay_those_of_the_rung(inputs):
    """Weights and state taken at a rung are not those that the trial goes on to change."""
    kept, copies = [], []

    def reached(point):
        kept.append(point.weights())
        copies.append({name: value.clone() for name, value in kept[-1].items()})

    run_trial(searching(), inputs, reached)
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))
    assert not same(kept[0], kept[-1])


def test_weights_are_the_moving_average(inputs):
    """A rung is judged by what its stage would hand on, the average where one is kept."""
    ((_, weights, state),) = looked_at(searching(scheduler="none"), inputs)
    assert same(weights, state.average)
    assert not same(weights, state.model)
    plain = dataclasses.replace(searching(scheduler="none").stage_two, average_share=0)
    config = dataclasses.replace(searching(scheduler="none"), stage_two=plain)
    ((_, weights, state),) = looked_at(config, inputs)
    assert state.average is None
    assert same(weights, state.model)


@pytest.mark.parametrize("stage_one", [False, True])
def test_seconds_are_those_of_all_training(inputs, monkeypatch, stage_one):
    """Each rung tells what was trained since the last: a clock of steps tells all steps, and the
    time of `reached` itself is nobody's.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sdn.trial, "time", SimpleNamespace(monotonic=lambda: clock.now))
    advance = Trainer.advance

    def ticking(self, *arguments):
        clock.now += 1
        return advance(self, *arguments)

    monkeypatch.setattr(Trainer, "advance", ticking)
    told = []

    def reached(point):
        told.append((point.images_seen, point.seconds))
        clock.now += 1000

    run_trial(searching(stage_one=stage_one, first_images=8, images=24), inputs, reached)
    # Stage one sees 14 images in 4 steps, then stage two.
    both = [(8, 2), (18, 3), (28, 3)]
    assert told == (both if stage_one else [(8, 2), (18, 3), (24, 2)])


@pytest.mark.parametrize(("step", "told"), [(0, []), (1, []), (4, [8, 10])])
def test_a_loss_that_is_not_finite_is_found_before_a_rung_is_told(inputs, monkeypatch, step, told):
    """A trial whose loss went bad reports no rung after it: its pictures would get a score."""
    losses, seen = Trainer.losses, []

    def broken(self, text, image):
        terms = losses(self, text, image)
        return {k: v * math.nan for k, v in terms.items()} if self.step == step else terms

    monkeypatch.setattr(Trainer, "losses", broken)
    with pytest.raises(LossNotFiniteError, match=f"not finite at step {step + 1} in "):
        run_trial(searching(), inputs, lambda point: seen.append(point.images_seen))
    assert seen == told


def test_only_a_trial_of_both_stages_leaves_the_shared_start_unread(inputs, tmp_path):
    """Stage two alone starts from the shared student; with stage one that is not even opened."""
    missing = dataclasses.replace(inputs, start=tmp_path / "none")
    config = searching(scheduler="none")
    with pytest.raises(FileNotFoundError):
        looked_at(config, missing)
    assert looked_at(searching(scheduler="none", stage_one=True), missing)
    weights = {k: v * 1.2 for k, v in new_student(config).state_dict().items()}
    write_model(tmp_path, config, inputs.captions, weights)
    started = looked_at(config, dataclasses.replace(inputs, start=tmp_path))
    assert not same(started[-1][1], looked_at(config, inputs)[-1][1])


def test_a_stage_starts_from_the_student_it_is_given(inputs, tmp_path):
    """`open_stage(student=)` takes that one and reads no folder; a checkpoint goes before it."""
    config = trial_config(searching(), SAMPLES)
    given = new_student(config)
    with torch.no_grad():
        for value in given.parameters():
            value.mul_(1.2)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    missing = dataclasses.replace(inputs, start=tmp_path / "none")
    work = open_stage("stage_two", config, missing, student=given)
    assert same(work.trainee.weights(), before)
    assert work.trainee.step == 0
    batch = next(iter(work.batches))
    work.advance(batch)
    assert not same(work.trainee.weights(), before)
    held = work.trainee.checkpoint()
    again = open_stage("stage_two", config, missing, held, student=new_student(config))
    assert same(again.trainee.checkpoint().model, held.model)
    assert again.trainee.step == 1


def test_images_seen_are_those_of_the_plan(inputs):
    """The borders that these tests expect are those of the plan of 10 images in batches of 4."""
    config = searching()
    plan = stage_plan(config, config.stage_two, inputs.data)
    seen, found = 0, []
    for step in range(8):
        seen += images_of(plan, step)
        found.append(seen)
    assert found == SEEN

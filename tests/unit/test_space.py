"""What a search varies: ranges about a run's own values, and configs with other ones."""

from __future__ import annotations

import dataclasses

import pytest

from sdn.config import TAP_GROUPS, LossWeights, Range, SearchConfig
from sdn.recipes import RECIPES, recipe
from sdn.space import check_space, own_share, own_values, space_of, with_values
from sdn.taps import blocks_of, taps_of

TAPS = [tap.name for tap in taps_of(blocks_of("vgg11", 0.125))]
EVERYTHING = (
    *TAP_GROUPS,
    *TAPS[1:],
    "rate",
    "share",
    *(f"stage_one.{name}" for name in (*TAP_GROUPS, *TAPS[1:], "rate")),
)
"""All names that can be searched with a VGG11."""


def searching(*names, stage_one=False, **changes):
    """Recipe tiny (a VGG11, 3 and 12 epochs) that varies these names."""
    space = {name: Range() for name in names} | changes.pop("space", {})
    search = SearchConfig(space=space, stage_one=stage_one, **changes)
    return dataclasses.replace(recipe("tiny"), search=search)


def with_stage(config, stage, **changes):
    return dataclasses.replace(
        config, **{stage: dataclasses.replace(getattr(config, stage), **changes)}
    )


def taps_weights(stage):
    return {name: stage.weights.of(name) for name in TAPS}


def test_own_values_are_those_of_the_stages():
    """Groups, single taps and rates are read from their stage, and share from both lengths."""
    config = searching(
        "image", "conv2", "conv3_1", "rate", "share", "stage_one.image", "stage_one.rate",
        "stage_one.pool4", stage_one=True,
    )  # fmt: skip
    config = with_stage(config, "stage_one", rate=2e-3, weights=LossWeights(image=7, conv4=0.5))
    config = with_stage(
        config, "stage_two", weights=LossWeights(image=60, conv2=3, conv3=4, taps={"conv3_1": 9})
    )
    assert own_values(config) == {
        "image": 60,
        "conv2": 3,
        "conv3_1": 9,
        "rate": 1e-3,
        "share": 3 / 15,
        "stage_one.image": 7,
        "stage_one.rate": 2e-3,
        "stage_one.pool4": 0.5,
    }


def test_ranges_are_factors_on_the_own_value():
    """Each range is its factors times the run's own value."""
    config = searching(space={"image": Range(low=0.5, high=4), "conv5": Range(low=1, high=3)})
    assert space_of(config) == {"image": (5, 40), "conv5": (1, 3)}
    assert list(space_of(searching("image", "conv5", "conv1"))) == ["conv1", "conv5", "image"]


@pytest.mark.parametrize("name", [*TAP_GROUPS, "conv3_1", "pool2"])
def test_a_weight_of_nought_stays_so(name):
    """What is left out of the loss has no factor that brings it in: it is not varied."""
    kept = "conv2" if name == "conv1" else "conv1"
    weights = LossWeights(**dict.fromkeys(TAP_GROUPS, 0.0) | {kept: 1.0})
    config = searching(name, "rate")
    config = with_stage(config, "stage_two", weights=weights)
    assert list(space_of(config)) == ["rate"]
    assert own_values(config) == {"rate": 1e-3}
    assert with_values(config, own_values(config)) == config


def test_a_range_of_one_value_is_left_out():
    """From 1 to 1 there is nothing to vary."""
    fixed = Range(low=1, high=1)
    assert list(space_of(searching("conv2", space={"conv1": fixed, "rate": fixed}))) == ["conv2"]


def test_a_rate_stays_below_one():
    """No rate that a config would refuse is in the range, of either stage."""
    config = searching("rate", "stage_one.rate", stage_one=True)
    config = with_stage(with_stage(config, "stage_one", rate=0.3), "stage_two", rate=0.5)
    assert space_of(config) == {"rate": (0.05, 0.999), "stage_one.rate": (0.03, 0.999)}
    for values in ({n: r[1] for n, r in space_of(config).items()}, {"rate": 0.05}):
        assert with_values(config, values).stage_two.rate == values["rate"]


def test_stage_two_keeps_a_part():
    """Stage one's share goes up to 0.95, whatever the factor, so that stage two is trained."""
    config = searching("share", stage_one=True)
    low, high = space_of(config)["share"]
    assert (low, high) == (pytest.approx(0.1 * 3 / 15), 0.95)
    assert with_values(config, {"share": high}).stage_two.epochs == pytest.approx(0.05 * 15)
    narrow = searching(space={"share": Range(low=0.5, high=1.5)}, stage_one=True)
    assert space_of(narrow)["share"] == pytest.approx((1.5 / 15, 4.5 / 15))


@pytest.mark.parametrize(
    ("one", "two", "share"), [(3, 4, 3 / 7), (1, 0, 1), (0, 1, 0), (0, 0, 0), (0.5, 1.5, 0.25)]
)
def test_own_share(one, two, share):
    """Stage one's part of the passes of both stages; 0 where there are none."""
    config = with_stage(recipe("tiny"), "stage_one", epochs=one)
    assert own_share(with_stage(config, "stage_two", epochs=two)) == share


def test_a_group_changes_its_taps_alone():
    """A group's value is that of each of its taps, and of no other; stage one keeps all."""
    before = searching("conv3")
    after = with_values(before, {"conv3": 5.0})
    changed = {"conv3_1", "conv3_2", "pool3"}
    old = taps_weights(before.stage_two)
    assert taps_weights(after.stage_two) == {
        name: 5.0 if name in changed else value for name, value in old.items()
    }
    assert after.stage_one == before.stage_one
    rest = dataclasses.replace(after.stage_two, weights=before.stage_two.weights)
    assert rest == before.stage_two


def test_a_tap_overrides_its_group():
    """A single tap's value wins over its group's, the config's own or one that is varied too."""
    before = with_stage(searching(), "stage_two", weights=LossWeights(taps={"pool1": 8.0}))
    after = with_values(before, {"conv3": 5.0, "conv3_1": 2.0, "conv5_2": 0.25}).stage_two.weights
    assert [after.of(name) for name in ("conv3_1", "conv3_2", "pool3")] == [2, 5, 5]
    assert [after.of(name) for name in ("conv5_1", "conv5_2")] == [1, 0.25]
    assert after.taps == {"pool1": 8.0, "conv3_1": 2.0, "conv5_2": 0.25}
    assert before.stage_two.weights.taps == {"pool1": 8.0}


def test_values_of_stage_one_change_stage_one():
    """`stage_one.` before a name means stage one's value, and stage two keeps its own."""
    before = searching(stage_one=True)
    values = {"stage_one.image": 3.0, "stage_one.conv2_1": 4.0, "stage_one.rate": 0.01}
    after = with_values(before, values)
    assert after.stage_one.weights.image == 3
    assert after.stage_one.weights.taps == {"conv2_1": 4.0}
    assert after.stage_one.rate == 0.01
    assert after.stage_two == before.stage_two


def test_a_rate_changes_a_rate_alone():
    """`rate` is stage two's."""
    before = searching("rate")
    after = with_values(before, {"rate": 0.02})
    assert after == with_stage(before, "stage_two", rate=0.02)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_share_keeps_the_whole_length(share):
    """Another share gives one stage what it takes from the other."""
    before = searching("share", stage_one=True)
    after = with_values(before, {"share": share})
    assert after.stage_one.epochs + after.stage_two.epochs == pytest.approx(15)
    assert own_share(after) == pytest.approx(share)
    lengths = {"stage_one": before.stage_one.epochs, "stage_two": before.stage_two.epochs}
    for stage, epochs in lengths.items():
        after = with_stage(after, stage, epochs=epochs)
    assert after == before


def test_no_values_change_nothing():
    """What is left out keeps its value; of nothing the config is the same."""
    config = searching(*EVERYTHING, stage_one=True)
    assert with_values(config, {}) == config


@pytest.mark.parametrize("name", RECIPES)
def test_own_values_give_the_recipe(name):
    """With the own values of groups and rates each recipe is itself."""
    config = recipe(name)
    names = [*TAP_GROUPS, "rate"]
    names += [f"stage_one.{name}" for name in names]
    search = SearchConfig(space={name: Range() for name in names}, stage_one=True)
    config = dataclasses.replace(config, search=search)
    assert set(own_values(config)) == set(names)
    assert with_values(config, own_values(config)) == config


def test_own_values_of_everything_weigh_the_same():
    """With single taps and share too, each term weighs the same and each stage is as long."""
    config = with_stage(searching(*EVERYTHING, stage_one=True), "stage_one", epochs=2.7)
    own = own_values(config)
    assert set(own) == set(EVERYTHING)
    found = with_values(config, own)
    for stage in ("stage_one", "stage_two"):
        before, after = getattr(config, stage), getattr(found, stage)
        assert taps_weights(after) == taps_weights(before)
        assert after.epochs == pytest.approx(before.epochs)
        same = {"weights": before.weights, "epochs": before.epochs}
        assert dataclasses.replace(after, **same) == before


def test_what_is_set_is_what_is_read():
    """Any values within the ranges are the own values of the config that they make."""
    config = searching(*EVERYTHING, stage_one=True)
    values = {
        name: low * (high / low) ** (number / len(EVERYTHING))
        for number, (name, (low, high)) in enumerate(space_of(config).items(), start=1)
    }
    assert own_values(with_values(config, values)) == pytest.approx(values)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_searched(name):
    """The search of each recipe works as it stands."""
    config = recipe(name)
    check_space(config)
    own = own_values(config)
    assert set(own) == set(TAP_GROUPS)
    assert all(low < own[name] < high for name, (low, high) in space_of(config).items())


def test_everything_can_be_searched():
    """All taps of the teacher in both stages, rates and share together."""
    check_space(searching(*EVERYTHING, stage_one=True))
    check_space(searching(*EVERYTHING, stage_one=True, workers=16))


@pytest.mark.parametrize("name", ["conv1_2", "stage_one.conv1_2", "conv3_4", "stage_one.conv4_3"])
def test_a_tap_that_the_teacher_lacks_is_named(name):
    """A VGG11 has one convolution in its first block: another is refused with those it has."""
    with pytest.raises(ValueError, match=rf"search\.space\.{name}: vgg11 has no such tap") as told:
        check_space(searching("image", name, stage_one=True))
    assert str(told.value).endswith("it has " + ", ".join(TAPS))
    config = searching("image", name, stage_one=True)
    check_space(
        dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, arch="vgg19"))
    )


@pytest.mark.parametrize("workers", [5, 7, 24, 48])
def test_impossible_numbers_of_workers(workers):
    """Workers must divide the lanes, 48, and each needs an image of the batch of 16."""
    with pytest.raises(ValueError, match=r"search\.workers must divide lanes \(48\)") as told:
        check_space(searching("image", workers=workers))
    assert str(told.value).endswith(f"at most the stages' global_batch (16), not {workers}")
    check_space(searching("image", workers=16))


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_searching_both_stages_needs_both(stage):
    """With a stage of no length there is no trial of both."""
    config = with_stage(searching("image", stage_one=True), stage, epochs=0)
    with pytest.raises(ValueError, match=r"search\.stage_one needs both stages"):
        check_space(config)
    check_space(dataclasses.replace(config, search=searching("image").search))


@pytest.mark.parametrize(
    "space",
    [
        {},
        {"conv5": Range()},
        {"image": Range(low=1, high=1)},
        {"conv5_1": Range(), "pool5": Range()},
    ],
)
def test_nothing_to_vary(space):
    """Names whose values have no room are refused with what can be done."""
    config = with_stage(searching(space=space), "stage_two", weights=LossWeights(conv5=0))
    with pytest.raises(ValueError, match=r"leaves nothing to vary: .*search\.trials=0"):
        check_space(config)


def test_stage_one_is_searched_whole_where_nothing_of_it_is_named():
    """On request alone its groups and its share are added; a name of it is taken as it is."""
    two = {*TAP_GROUPS}
    asked = with_search(recipe("tiny"), stage_one=True)
    assert set(space_of(asked)) == two | {f"stage_one.{name}" for name in two} | {"share"}
    assert set(space_of(with_search(recipe("tiny")))) == two
    assert set(space_of(searching("image", "share", stage_one=True))) == {"image", "share"}


def with_search(config, **changes):
    return dataclasses.replace(config, search=dataclasses.replace(config.search, **changes))

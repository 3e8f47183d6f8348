"""When a training is said to have diverged whose loss is still a number."""

from __future__ import annotations

import math

import pytest

from sdn.diverging import Divergence

CALM = [20.0, 55.0, 30.0, 25.0, 40.0] * 4


def noticed(norms, name="stage_three"):
    """(position, text) of each notice."""
    divergence = Divergence(name)
    found = [(n, divergence.notice(20 * n, norm)) for n, norm in enumerate(norms)]
    return [(n, text) for n, text in found if text is not None]


def test_gradients_out_of_proportion_are_told_once():
    """The third in a row is told, with step, norm, the usual one, and what to change."""
    ((position, text),) = noticed([*CALM, 4e10, 3e10, 5e10, 6e10, 1e9])
    assert position == len(CALM) + 2
    assert text.startswith("at step 440 the gradient's norm is 5e+10, where 30 was usual:")
    assert "--set stage_three.rate=" in text
    assert "--set stage_three.clip=" in text


def test_a_hundred_times_is_out_of_proportion():
    """Of what is usual lately: what was long ago says nothing."""
    ((position, _),) = noticed([*[1e4] * 300, *CALM * 10, *[3100.0] * 3])
    assert position == 300 + 10 * len(CALM) + 2


def test_a_fit_without_a_clip_is_told_of_its_rate_alone():
    """A setting that it lacks is no advice."""
    ((_, text),) = noticed([*CALM, 1e9, 1e9, 1e9], name="captions")
    assert "--set captions.rate=" in text
    assert "clip" not in text


@pytest.mark.parametrize(
    "norms",
    [
        [*CALM, *[2900.0] * 9],
        [*CALM, 1e9, 1e9, 30.0, 1e9, 1e9, 30.0],
        [*CALM[:9], 1e9, 1e9, 1e9, *CALM],
        [*CALM, *[math.inf] * 9],
        [1e9, 1e9, 1e9, *CALM],
        [*[0.0] * 12, *CALM],
    ],
    ids=[
        "in proportion",
        "single ones",
        "nothing usual yet",
        "overflow of fp16",
        "a steep start",
        "frozen at first",
    ],
)
def test_what_a_training_recovers_from_is_not_told(norms):
    """Nor what nobody can call unusual yet."""
    assert noticed(norms) == []

"""Nearest training images by label."""

from __future__ import annotations

import itertools

import pytest

from sdn.baselines import TONES, nearest_by_tone, tone_distance

LIGHT, MEDIUM_LIGHT, MEDIUM, MEDIUM_DARK, DARK = TONES


def label(concept, tone=None, **others):
    return {"concept": concept} | ({"tone": tone} if tone else {}) | others


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [
        (LIGHT, LIGHT, 0),
        (LIGHT, DARK, 4),
        (MEDIUM_LIGHT, MEDIUM, 1),
        (f"{LIGHT}, {DARK}", f"{LIGHT}, {DARK}", 0),
        (f"{LIGHT}, {DARK}", f"{DARK}, {LIGHT}", 8),
        (f"{LIGHT}, {MEDIUM}", f"{LIGHT}, {DARK}", 2),
        (MEDIUM, f"{MEDIUM}, {MEDIUM}", 0),
        (MEDIUM, f"{LIGHT}, {DARK}", 4),
        ("", "", 0),
    ],
)
def test_tone_distance(a, b, steps):
    """Steps along the scale, summed over the people; one tone beside two is that of both."""
    assert tone_distance(a, b) == tone_distance(b, a) == steps


def test_no_tone_is_further_than_any_tone():
    """A picture without tone is further off than the furthest tones of one and of two people."""
    pairs = [f"{a}, {b}" for a, b in itertools.product(TONES, repeat=2)]
    most = max(tone_distance(a, b) for a in [*TONES, *pairs] for b in [*TONES, *pairs])
    assert all(tone_distance(tone, "") > most for tone in [*TONES, *pairs])


def test_nearest_by_tone_picks_the_tones_beside():
    """Of one concept the two nearest tones are taken, nearest first."""
    train = [
        label("cook", LIGHT),
        label("cook", MEDIUM_LIGHT),
        label("cook", MEDIUM_DARK),
        label("pilot", DARK),
        label("cook"),
    ]
    assert nearest_by_tone([label("cook", DARK)], train).tolist() == [[2, 1]]
    assert nearest_by_tone([label("cook", LIGHT)], train).tolist() == [[0, 1]]


def test_ties_go_to_the_earlier_row():
    """Two tones equally far are taken in the order of the training samples."""
    train = [label("cook", DARK), label("cook", MEDIUM_DARK), label("cook", MEDIUM_LIGHT)]
    assert nearest_by_tone([label("cook", MEDIUM)], train).tolist() == [[1, 2]]
    assert nearest_by_tone([label("cook", MEDIUM)], train[::-1]).tolist() == [[0, 1]]


def test_gender_and_hair_come_before_tone():
    """A sibling of the same gender and hair in a far tone beats another kind in the same tone."""
    train = [
        label("person", DARK, gender="man", hair="red hair"),
        label("person", LIGHT, gender="woman", hair="red hair"),
        label("person", DARK, gender="woman", hair="curly hair"),
        label("person", DARK, gender="man", hair="curly hair"),
    ]
    wanted = label("person", DARK, gender="woman", hair="red hair")
    assert nearest_by_tone([wanted], train).tolist() == [[1, 0]]


def test_two_people():
    """Pictures of two people are nearest by both tones, and one shared tone stands for both."""
    train = [
        label("couple", f"{LIGHT}, {DARK}"),
        label("couple", f"{DARK}, {LIGHT}"),
        label("couple", MEDIUM),
        label("couple"),
    ]
    found = nearest_by_tone(
        [label("couple", f"{LIGHT}, {MEDIUM_DARK}"), label("couple", f"{MEDIUM}, {MEDIUM_DARK}")],
        train,
    )
    assert found.tolist() == [[0, 2], [2, 0]]


def test_one_sibling_is_taken_twice():
    """A concept with a single training sample gives that one for both."""
    train = [label("pilot", LIGHT), label("cook", DARK)]
    assert nearest_by_tone([label("cook", LIGHT)], train).tolist() == [[1, 1]]


def test_unknown_concept_falls_back_on_all():
    """A concept that no training sample has is compared with all of them by tone."""
    train = [label("pilot", LIGHT), label("cook", DARK), label("nurse", MEDIUM)]
    assert nearest_by_tone([label("judge", DARK)], train).tolist() == [[1, 2]]


def test_data_without_tones_has_no_such_baseline():
    """Where no training sample has a tone there is nothing to be near to."""
    assert nearest_by_tone([label("cook", DARK)], [{}, {"concept": "cook"}]) is None


def test_one_row_a_sample():
    """There is one pair of rows a sample, in the order of the samples."""
    train = [label("cook", tone) for tone in TONES]
    found = nearest_by_tone([label("cook", tone) for tone in TONES], train)
    assert found.shape == (5, 2)
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4]

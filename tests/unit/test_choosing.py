"""Who is worth full length and whose values are taken: every way it can go, and how often."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sdn.choosing import Choice, Contender, choose, rank_correlation, worth_full_length
from sdn.scores.paired import Paired, paired_shares
from sdn.scores.score import normal_interval

LEVEL = 0.025


def paired(gain, p, needed=None, error=0.005):
    return Paired(
        gain=normal_interval(gain, error, 200, "test"), error=error, p_value=p, needed=needed
    )


def contender(number, gain, p, cost=100.0, needed=None):
    return Contender(number=number, gain=paired(gain, p, needed), cost_s=cost)


def never(first, second):
    pytest.fail(f"{first} and {second} were compared")


def between_of(p):
    """A comparison of two contenders with this p-value, and which were asked for."""
    asked = []

    def between(first, second):
        asked.append((first, second))
        return paired(0.01, p)

    return between, asked


def test_the_best_short_trials_come_first():
    """By their gain, of equal ones the cheaper, then the earlier."""
    found = [
        contender(1, 0.01, 0.5),
        contender(2, 0.03, 0.5),
        contender(3, -0.02, 0.9),
        contender(4, 0.02, 0.5, cost=90),
        contender(6, 0.02, 0.5),
        contender(5, 0.02, 0.5),
    ]
    assert worth_full_length(found, 9, 1.0) == [2, 4, 5, 6, 1, 3]
    assert worth_full_length(found[::-1], 9, 1.0) == [2, 4, 5, 6, 1, 3]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_at_most_so_many_are_trained_again(count):
    """No more than asked for, and the best of them."""
    found = [contender(n, n / 100, 0.5) for n in (1, 2, 3)]
    assert worth_full_length(found, count, 1.0) == [3, 2, 1][:count]
    assert worth_full_length([], count, 1.0) == []


def test_only_what_has_gained_is_trained_again():
    """A p-value up to the level will do, a larger one will not, whatever the gain."""
    found = [contender(1, 0.01, 0.0249), contender(2, 0.09, 0.026), contender(3, 0.02, 0.025)]
    assert worth_full_length(found, 9, LEVEL) == [3, 1]
    assert worth_full_length(found, 9, 0.02) == []
    assert worth_full_length(found, 9, 1.0) == [2, 3, 1]


def test_own_stay_where_nothing_was_trained_beside_them():
    """Without contenders there is nothing to choose, and it is said."""
    found = choose([], LEVEL, never)
    assert found == Choice(number=0, reason="nothing was trained at full length beside them")


def test_own_stay_where_nothing_gains_beyond_chance():
    """The reason names the best of them, its gain, and how many captions would show it."""
    found = choose(
        [contender(3, 0.001, 0.42, needed=39_200), contender(5, -0.01, 0.98)], LEVEL, never
    )
    assert found.number == 0
    assert found.reason == (
        "no other values beat them at full length beyond chance: the best, trial 3, gains +0.001 "
        "(-0.0088 to +0.0108) on 200 captions, p = 0.42, not below 0.0125 (0.025 over 2); a gain "
        "of this size would need about 39,200 captions"
    )


def test_a_loss_names_no_number_of_captions():
    """Where the best has lost no number of captions would show a gain."""
    found = choose([contender(5, -0.01, 0.98)], LEVEL, never)
    assert found.number == 0
    assert found.reason.endswith("gains -0.01 (-0.0198 to -0.0002) on 200 captions, p = 0.98, not "
                                 "below 0.025")  # fmt: skip


@pytest.mark.parametrize(
    ("contenders", "p", "number"),
    [
        (1, 0.0249, 1),
        (1, 0.025, 0),
        (1, 0.02, 1),
        (2, 0.02, 0),
        (2, 0.0125, 0),
        (2, 0.0124, 1),
        (5, 0.0124, 0),
        (5, 0.0049, 1),
    ],
)
def test_each_of_several_is_asked_for_more(contenders, p, number):
    """Of n contenders each must have a p-value below an n-th of the level (Bonferroni)."""
    found = [contender(1, 0.02, p)] + [contender(n, 0.0, 0.5) for n in range(2, contenders + 1)]
    choice = choose(found, LEVEL, never)
    assert choice.number == number
    shown = f"{LEVEL / contenders:.3g}" + (f" (0.025 over {contenders})" if contenders > 1 else "")
    assert f"below {shown}" in choice.reason


def test_the_best_is_taken():
    """Of several that beat the own values the one of the largest gain, whatever their order."""
    found = [contender(1, 0.02, 0.001), contender(2, 0.05, 0.004), contender(3, 0.03, 0.0001)]
    for some in (found, found[::-1]):
        choice = choose(some, LEVEL, never)
        assert choice.number == 2
        assert choice.reason == (
            "beats the recipe's own at full length: +0.05 (+0.0402 to +0.0598) on 200 captions, "
            "p = 0.004, below 0.00833 (0.025 over 3)"
        )


def test_a_larger_gain_that_chance_explains_is_not_the_best():
    """Only what is below the level is chosen from."""
    found = [contender(1, 0.02, 0.001), contender(2, 0.05, 0.03)]
    assert choose(found, LEVEL, never).number == 1


def test_a_cheaper_one_of_equals_is_taken():
    """The cheapest that the best is not shown to beat, at the whole level, and it is said."""
    found = [
        contender(1, 0.05, 0.001, cost=150),
        contender(2, 0.04, 0.001, cost=100),
        contender(3, 0.03, 0.001, cost=110),
    ]
    between, asked = between_of(0.025)
    choice = choose(found, LEVEL, between)
    assert choice.number == 2
    assert asked == [(2, 1)]  # by how much the best is better than the cheapest
    assert choice.reason == (
        "beats the recipe's own at full length: +0.04 (+0.0302 to +0.0498) on 200 captions, "
        "p = 0.001, below 0.00833 (0.025 over 3); trial 1 is not shown to be better and takes 50% "
        "longer"
    )


def test_a_cheaper_one_that_is_worse_is_left():
    """Where the best is shown to be better than the cheaper ones it is taken."""
    found = [
        contender(1, 0.05, 0.001, cost=150),
        contender(2, 0.04, 0.001, cost=100),
        contender(3, 0.03, 0.001, cost=110),
    ]
    between, asked = between_of(0.0249)
    choice = choose(found, LEVEL, between)
    assert choice.number == 1
    assert asked == [(2, 1), (3, 1)]
    assert "longer" not in choice.reason
    only_third = {2: 0.001, 3: 0.5}
    choice = choose(found, LEVEL, lambda cheap, best: paired(0.01, only_third[cheap]))
    assert choice.number == 3
    assert choice.reason.endswith("trial 1 is not shown to be better and takes 36% longer")


@pytest.mark.parametrize(
    ("cost", "p"),
    [(75, 0.001), (100, 0.001), (300, 0.001), (50, 0.0125), (50, 0.5)],
    ids=["a quarter cheaper", "as dear", "dearer", "not below the level", "no better than the own"],
)
def test_what_is_hardly_cheaper_or_no_better_is_left(cost, p):
    """More than a quarter less counts as cheaper, and only of what itself beats the own."""
    found = [contender(1, 0.05, 0.001, cost=100), contender(2, 0.04, p, cost=cost)]
    assert choose(found, LEVEL, never).number == 1
    cheap = [found[0], contender(2, 0.04, 0.001, cost=74)]
    assert choose(cheap, LEVEL, between_of(0.5)[0]).number == 2


@pytest.mark.parametrize("contenders", [1, 3])
def test_what_is_only_as_good_seldom_replaces_the_own(monkeypatch, contenders):
    """With contenders as good as the own values these are replaced about as often as the level
    says at most, though the best of several is looked at; a true gain mostly replaces them.
    """
    monkeypatch.setattr("sdn.scores.paired.FLIPS", 1000)
    random, level, repeats, captions = np.random.default_rng(0), 0.1, 400, 40

    def replaced(gain):
        parts = {n: torch.from_numpy(random.random(captions)) for n in range(contenders + 1)}
        found = [
            Contender(number=n, gain=paired_shares(parts[0], parts[n] + gain), cost_s=100.0 - n)
            for n in range(1, contenders + 1)
        ]
        return choose(found, level, lambda a, b: paired_shares(parts[a], parts[b])).number != 0

    count = sum(replaced(0.0) for _ in range(repeats))
    deviation = (level * (1 - level) * repeats) ** 0.5
    assert 0.02 * repeats <= count <= level * repeats + 3 * deviation
    assert sum(replaced(0.3) for _ in range(40)) >= 36


def test_scores_in_the_same_order_correlate():
    """1 where short and full length have the same order, whatever the numbers between."""
    found = rank_correlation({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.9}, {0: 1, 1: 5, 2: 6, 3: 7})
    assert found["trials"] == 4
    assert found["value"] == pytest.approx(1)
    assert 0 <= found["p_value"] <= 0.05
    assert json.loads(json.dumps(found)) == found


def test_scores_in_the_opposite_order():
    """-1 where the order is turned about."""
    found = rank_correlation({0: 0.1, 1: 0.2, 2: 0.3}, {2: 1.0, 1: 2.0, 0: 3.0})
    assert found["trials"] == 3
    assert found["value"] == pytest.approx(-1)


def test_a_correlation_of_ranks_by_hand():
    """1 - 6 sum d^2 / (n (n^2 - 1)) where no two are equal: ranks 1 2 3 4 5 against 2 1 4 3 5."""
    full = dict(enumerate([0.2, 0.1, 0.4, 0.3, 0.5]))
    found = rank_correlation(dict(enumerate([1, 2, 3, 4, 5])), full)
    assert found["value"] == pytest.approx(1 - 6 * 4 / (5 * 24))


def test_only_trials_of_both_lengths_are_compared():
    """Trials that were not trained again say nothing."""
    short = {0: 0.1, 1: 0.2, 2: 0.3, 3: 9.0, 4: -9.0}
    found = rank_correlation(short, {0: 1, 1: 2, 2: 3, 7: -5})
    assert found["trials"] == 3
    assert found["value"] == pytest.approx(1)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_trials_for_a_correlation(count):
    """Below 3 pairs there is no correlation, and it is said what would give one."""
    found = rank_correlation({0: 0.1, 1: 0.2, 2: 0.3}, {n: 0.1 * n for n in range(count)})
    assert found == {
        "trials": count,
        "withheld": f"needs 3 trials at full length, there are {count} (search.reruns)",
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("equal", ["short", "full", "both"])
def test_equal_scores_have_no_order(equal):
    """Where all scores of one length are equal there is no correlation, and no warning either."""
    rising, flat = {0: 0.1, 1: 0.2, 2: 0.3}, dict.fromkeys(range(3), 0.5)
    short = flat if equal in ("short", "both") else rising
    full = flat if equal in ("full", "both") else rising
    assert rank_correlation(short, full) == {"trials": 3, "withheld": "the scores do not differ"}

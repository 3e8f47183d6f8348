"""Drift: silent where nothing changed, as often as it says; heard where something did."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from sdn.drift import LEAST, length_drift, two_sample_test, word_drift
from sdn.features.rows import HeldRows
from sdn.scores.kernel import kid


def draws(seed, count, shift=0.0, dim=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) + shift


def test_without_a_difference_p_values_are_uniform():
    """200 pairs of draws of one distribution: p-values pass a test of uniformity at 1%."""
    found = [
        two_sample_test(draws(2 * n, 40), draws(2 * n + 1, 25), permutations=199, seed=n)
        for n in range(200)
    ]
    p_values = np.array([one.p_value for one in found])
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(p_values <= 0.05) < 0.11


def test_a_planted_difference_is_found():
    """A shift of half a deviation in 16 numbers is certain in 100 against 100 vectors."""
    found = two_sample_test(draws(0, 100), draws(1, 100, shift=0.5))
    assert found.p_value == 1 / 1000
    assert (found.first, found.second) == (100, 100)
    assert found.value > 0


def test_the_value_is_kid():
    """The statistic is the score that models are held against, to the rounding of float32."""
    first, second = draws(0, 60), draws(1, 45, shift=0.2)
    expected = kid(HeldRows(first), HeldRows(second)).value
    assert two_sample_test(first, second, permutations=1).value == pytest.approx(expected, rel=1e-4)


def test_order_and_equal_vectors_do_not_matter():
    """Exchanged sides give the same value; sets of one vector alone differ in nothing."""
    first, second = draws(0, 30), draws(1, 50, shift=0.3)
    one, other = two_sample_test(first, second), two_sample_test(second, first)
    assert one.value == pytest.approx(other.value)
    same = torch.ones(20, 4)
    assert two_sample_test(same, same).p_value == 1


def test_few_samples_are_not_tested():
    """Below the least number there is no verdict."""
    few = draws(0, LEAST - 1)
    assert two_sample_test(few, draws(1, 50)) is None
    assert length_drift([1] * 50, [1] * (LEAST - 1)) is None


def test_words_out_of_sight_are_counted():
    """Words and captions with words never seen, in any case, and the most frequent first."""
    found = word_drift({"a", "red", "bird"}, ["A RED bird", "a blue bird", "blue, blue finch", ""])
    assert (found.words, found.unseen_words) == (9, 4)
    assert (found.captions, found.unseen_captions) == (4, 2)
    assert found.most == (("blue", 3), ("finch", 1))
    assert found.as_dict()["unseen_caption_share"] == 0.5
    assert word_drift(set(), []).as_dict()["unseen_word_share"] == 0


def test_lengths_of_captions():
    """Equal lengths do not differ, captions twice as long do."""
    before = [20 + n % 7 for n in range(300)]
    assert length_drift(before, before[:100]).p_value > 0.5
    longer = length_drift(before, [2 * n for n in before[:100]])
    assert longer.p_value < 1e-6
    assert longer.median == 2 * longer.median_before

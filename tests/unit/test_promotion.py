"""The promotion rule: every way it can go, and what it says."""

from __future__ import annotations

import json

import pytest
import torch

from sdn.config import PromotionConfig
from sdn.features.rows import HeldRows
from sdn.promotion import decide
from sdn.scores.paired import Paired, paired_kid, paired_shares
from sdn.scores.score import normal_interval


def paired(gain, error, p, needed=None, count=200):
    return Paired(
        gain=normal_interval(gain, error, count, "test"), error=error, p_value=p, needed=needed
    )


BETTER, LEVEL = paired(0.02, 0.005, 0.0001, 90), paired(0.001, 0.005, 0.42, 39_200)
SAME_MATCH, WORSE_MATCH = paired(-0.01, 0.02, 0.6), paired(-0.08, 0.03, 0.99)


def test_better_and_not_worse_matched_is_promoted():
    """A lower KID beyond chance with caption match within the margin takes over."""
    found = decide(BETTER, SAME_MATCH, PromotionConfig(), "version 3")
    assert found.promoted
    assert found.reason == (
        "better than version 3: gain in KID +0.02 (+0.0102 to +0.0298) on 200 captions, "
        "p = 0.0001; gain in caption match -1.0% (-4.9% to +2.9%)"
    )
    assert (found.kid, found.match) == (BETTER, SAME_MATCH)


def test_no_better_than_chance_stays():
    """A gain that chance explains changes nothing, and the text says how many captions it needs."""
    found = decide(LEVEL, SAME_MATCH, PromotionConfig(), "version 3")
    assert not found.promoted
    assert found.reason == (
        "not better than version 3 beyond chance: gain in KID +0.001 (-0.0088 to +0.0108) on 200 "
        "captions, p = 0.42, not below 0.025; a gain of this size would need about 39,200"
    )


def test_a_loss_needs_no_number_of_captions():
    """Where there is no gain no number of captions would show one."""
    found = decide(paired(-0.02, 0.005, 1.0), SAME_MATCH, PromotionConfig(), "version 3")
    assert not found.promoted
    assert found.reason.endswith("p = 1, not below 0.025")


def test_worse_caption_match_stays():
    """A lower KID is not enough where it is not shown that caption match holds."""
    found = decide(BETTER, WORSE_MATCH, PromotionConfig(), "version 3")
    assert not found.promoted
    assert found.reason.startswith("not better than version 3: gain in KID +0.02")
    assert found.reason.endswith(
        "but gain in caption match -8.0% (-13.9% to -2.1%): that it is not worse by more than 10% "
        "is not shown"
    )


def test_without_caption_match_kid_decides():
    """Too few captions for caption match are told, not held against the challenger."""
    found = decide(BETTER, None, PromotionConfig(), "version 3")
    assert found.promoted
    assert found.reason.endswith("p = 0.0001; too few captions for caption match")
    assert not decide(LEVEL, None, PromotionConfig(), "version 3").promoted
    assert found.as_dict()["match"] is None


@pytest.mark.parametrize(("p", "promoted"), [(0.0249, True), (0.025, False)])
def test_level_is_the_limit_of_p(p, promoted):
    """Only a p-value below the level promotes."""
    assert decide(paired(0.02, 0.01, p), None, PromotionConfig(), "v").promoted == promoted


@pytest.mark.parametrize(
    ("gain", "margin", "promoted"), [(-0.060, 0.1, True), (-0.062, 0.1, False), (-0.062, 0.2, True)]
)
def test_margin_is_the_limit_of_caption_match(gain, margin, promoted):
    """The lower end at the level, here 1.96 errors below the gain, must lie above the margin."""
    match = paired(gain, 0.02, 0.9)
    assert decide(BETTER, match, PromotionConfig(margin=margin), "v").promoted == promoted


@pytest.mark.parametrize(("held", "promoted"), [(0.9, True), (0.19, False)])
def test_a_margin_that_says_nothing_is_not_all(held, promoted):
    """Where few captions are found at all, worse beyond chance is too bad at any margin."""
    match = paired(-0.05, 0.01, 1.0)
    found = decide(BETTER, match, PromotionConfig(), "v", held)
    assert found.promoted == promoted
    assert found.reason.endswith("worse beyond chance") != promoted


def test_a_wider_level_asks_for_less():
    """Both questions are asked at the configured level."""
    config = PromotionConfig(level=0.2)
    assert decide(paired(0.01, 0.01, 0.15), None, config, "v").promoted
    match = paired(-0.075, 0.02, 0.9)
    assert decide(BETTER, match, config, "v").promoted
    assert not decide(BETTER, match, PromotionConfig(), "v").promoted


def test_decision_survives_json():
    """All numbers of a decision are plain values."""
    found = decide(BETTER, SAME_MATCH, PromotionConfig(), "v").as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["kid"]["gain"]["value"] == 0.02
    assert found["promoted"] is True


def test_equal_models_are_seldom_promoted():
    """Of 200 pairs of equally good models at most 5% are promoted; a clear gain mostly is."""

    def rows(seed, shift=0.0):
        generator = torch.Generator().manual_seed(seed)
        return HeldRows(torch.randn(30, 4, generator=generator) + shift)

    real, promoted, found = rows(1), 0, 0
    for trial in range(200):
        coins = torch.rand(2, 30, generator=torch.Generator().manual_seed(trial)) < 0.5
        match = paired_shares(*coins.float())
        pair = paired_kid(real, rows(2000 + trial), rows(3000 + trial))
        promoted += decide(pair, match, PromotionConfig(margin=0.5), "v").promoted
        if trial < 40:
            gain = paired_kid(real, rows(2000 + trial, 0.8), rows(3000 + trial))
            found += decide(gain, match, PromotionConfig(margin=0.5), "v").promoted
    assert promoted <= 10
    assert found >= 36

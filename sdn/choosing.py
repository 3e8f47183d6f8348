"""Which trials are worth full length, and whose values replace the recipe's own.

The best of many noisy trials looks better than it is. So a short trial never replaces anything: the
best few are trained again at full length, and only what beats the recipe's own values there beyond
chance, on validation captions and counting how many were compared, takes their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sdn.scores.paired import Paired

_CHEAPER = 0.75
"""A trial is cheaper than another where it takes less than this share of its time."""
_LEAST = 3
"""Pairs of scores below which there is no rank correlation to speak of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """Values that were tried, beside the recipe's own."""

    number: int
    """Of the trial; 0 has the recipe's own values."""
    gain: Paired
    """By how much it is better than the recipe's own values, on the same captions."""
    cost_s: float
    """What it took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Whose values to go on with, and why."""

    number: int
    """Of the trial; 0 keeps the recipe's own."""
    reason: str


def worth_full_length(contenders: Sequence[Contender], count: int, level: float) -> list[int]:
    """Numbers of the trials to train again at full length, best first.

    Args:
        contenders: trials that came to the end of their short form, the recipe's own left out.
        count: at most so many.
        level: largest p-value of their gain.
    """
    worth = [one for one in contenders if one.gain.p_value <= level]
    worth.sort(key=lambda one: (-_gain(one), one.cost_s, one.number))
    return [one.number for one in worth[:count]]


def choose(
    contenders: Sequence[Contender],
    level: float,
    between: Callable[[int, int], Paired],
) -> Choice:
    """The recipe's own values, unless others beat them at full length beyond chance.

    With several contenders each is asked at a part of the level (Bonferroni). Of those that are
    better, one that is not shown to be worse than the best of them and is cheaper is taken instead.

    Args:
        contenders: at full length, the recipe's own left out.
        level: chance of replacing the recipe's own by what is only as good, 0..1.
        between: (number, number) -> by how much the second is better than the first.
    """
    if not contenders:
        return Choice(number=0, reason="nothing was trained at full length beside them")
    each = level / len(contenders)
    asked = f"{each:.3g}" + (f" ({level:g} over {len(contenders)})" if len(contenders) > 1 else "")
    better = [one for one in contenders if one.gain.p_value < each]
    nearest = max(contenders, key=_gain)
    if not better:
        told = _told(nearest.gain)
        needed = nearest.gain.needed
        more = f"; a gain of this size would need about {needed:,} captions" if needed else ""
        return Choice(
            number=0,
            reason=f"no other values beat them at full length beyond chance: the best, trial "
            f"{nearest.number}, gains {told}, not below {asked}{more}",
        )
    best = max(better, key=_gain)
    taken = best
    for one in sorted(better, key=lambda one: one.cost_s):
        if one.cost_s >= _CHEAPER * best.cost_s:
            break
        if between(one.number, best.number).p_value >= level:
            taken = one
            break
    reason = f"beats the recipe's own at full length: {_told(taken.gain)}, below {asked}"
    if taken is not best:
        reason += (
            f"; trial {best.number} is not shown to be better and takes "
            f"{best.cost_s / taken.cost_s - 1:.0%} longer"
        )
    return Choice(number=taken.number, reason=reason)


def rank_correlation(short: Mapping[int, float], full: Mapping[int, float]) -> dict[str, Any]:
    """Spearman's correlation of the scores of the same trials in short form and at full length.

    Args:
        short, full: number of the trial -> score.

    Returns:
        `trials` (how many have both), and `value` (-1..1) with `p_value`, or `withheld`.
    """
    from scipy.stats import spearmanr

    both = sorted(short.keys() & full.keys())
    found: dict[str, Any] = {"trials": len(both)}
    if len(both) < _LEAST:
        why = f"needs {_LEAST} trials at full length, there are {len(both)} (search.reruns)"
        return found | {"withheld": why}
    scores = [[short[n] for n in both], [full[n] for n in both]]
    if any(len(set(of_one)) == 1 for of_one in scores):
        return found | {"withheld": "the scores do not differ"}
    result = spearmanr(*scores)
    return found | {"value": float(result.statistic), "p_value": float(result.pvalue)}


def _gain(one: Contender) -> float:
    assert one.gain.gain.value is not None
    return one.gain.gain.value


def _told(paired: Paired) -> str:
    gain = paired.gain
    return (
        f"{gain.value:+.3g} ({gain.low:+.3g} to {gain.high:+.3g}) on {gain.count:,} captions, "
        f"p = {paired.p_value:.2g}"
    )

"""A score as it is reported: never without its interval, or the reason why it is withheld."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

LEVEL = 0.95
"""Of every interval."""
_Z = 1.959964


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One figure of one set of images."""

    value: float | None = None
    """None where it is withheld."""
    low: float | None = None
    """Lower end of its 95% interval; None where it has none."""
    high: float | None = None
    """Upper end of it."""
    interval: str = ""
    """How the interval was come by."""
    count: int = 0
    """Images (or captions) that it is of."""
    withheld: str = ""
    """Why there is no value."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values; what is empty is left out."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v not in {None, ""}}


def normal_interval(
    value: float, error: float, count: int, how: str, least: float = -math.inf
) -> Score:
    """A value with its standard error as a score: value +- 1.96 errors, but not below `least`."""
    low, high = max(least, value - _Z * error), value + _Z * error
    return Score(value=value, low=low, high=high, interval=how, count=count)


def of_share(share: float, count: int, independent: int | None = None) -> Score:
    """A share of `count` cases, 0..1, with Wilson's interval for those that are independent.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Args:
        share: 0..1.
        count: cases.
        independent: how many of these at least are independent (captions of the same image are
            not); None for all.
    """
    low, high = wilson(share, independent or count)
    return Score(value=share, low=low, high=high, interval="Wilson", count=count)


def wilson(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share observed `count` times, `count` > 0."""
    centre = share + _Z**2 / (2 * count)
    spread = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

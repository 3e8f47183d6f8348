"""The promotion rule: a challenger takes over only if it is better beyond chance."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdn.config import PromotionConfig
    from sdn.scores.paired import Paired


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Whether a challenger is promoted, and the numbers that say so."""

    promoted: bool
    reason: str
    kid: Paired
    """Gain in KID: by how much the challenger's is lower."""
    match: Paired | None
    """Gain in caption match; None where the data set has too few captions for it."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


def decide(
    kid: Paired,
    match: Paired | None,
    config: PromotionConfig,
    champion: str,
    held: float = 1.0,
) -> Decision:
    """Promote if KID is lower beyond chance and caption match is not worse beyond a margin.

    Both are asked at `config.level`: the chance of promoting a version that is only as good as the
    champion is at most that.

    Args:
        kid, match: paired on the same captions and seeds, see `sdn.scores.paired`.
        config: level and margin.
        champion: what the challenger is compared with, for the text.
        held: its caption match, 0..1. Where the margin is more than half of it, the margin says
            nothing, and a challenger that is worse beyond chance is not promoted either.
    """
    told = f"gain in KID {_told(kid)} on {kid.gain.count:,} captions, p = {kid.p_value:.2g}"
    if kid.p_value >= config.level:
        enough = f"; a gain of this size would need about {kid.needed:,}" if kid.needed else ""
        reason = (
            f"not better than {champion} beyond chance: {told}, not below {config.level}{enough}"
        )
        return Decision(promoted=False, reason=reason, kid=kid, match=match)
    if match is None:
        reason = f"better than {champion}: {told}; too few captions for caption match"
        return Decision(promoted=True, reason=reason, kid=kid, match=match)
    assert match.gain.value is not None
    lowest = match.gain.value + NormalDist().inv_cdf(config.level) * match.error
    shown = f"gain in caption match {_told(match, '+.1%')}"
    highest = match.gain.value - NormalDist().inv_cdf(config.level) * match.error
    if lowest < -config.margin or (highest < 0 and held < 2 * config.margin):
        reason = (
            f"not better than {champion}: {told}, but {shown}: that it is not worse by more than "
            f"{config.margin:.0%} is not shown"
            if lowest < -config.margin
            else f"not better than {champion}: {told}, but {shown}: worse beyond chance"
        )
        return Decision(promoted=False, reason=reason, kid=kid, match=match)
    reason = f"better than {champion}: {told}; {shown}"
    return Decision(promoted=True, reason=reason, kid=kid, match=match)


def _told(found: Paired, form: str = "+.3g") -> str:
    gain = found.gain
    return f"{gain.value:{form}} ({gain.low:{form}} to {gain.high:{form}})"

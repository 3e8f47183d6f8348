"""Whether one model is better than another beyond chance, on the same captions and seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdn.scores.kernel import MOST, kernel_sums, own_sums
from sdn.scores.score import Score, normal_interval

if TYPE_CHECKING:
    from sdn.features.rows import Rows

FLIPS = 20_000
"""Random swaps that the p-value is read from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """A difference between two models, seen from the challenger: positive is better."""

    gain: Score
    """By how much the challenger is better."""
    error: float
    """Standard error of the gain over the captions."""
    p_value: float
    """How often swapping the two models' images of each caption by a fair coin gives at least this
    gain, 0..1."""
    needed: int | None
    """Captions at which a true gain of this size would be found in 80% of the trials; None where
    there is no gain."""


def paired_kid(real: Rows, champion: Rows, challenger: Rows) -> Paired:
    """By how much the challenger's KID is lower than the champion's, and its p-value.

    If the two models are equally good in the sense that swapping their images of a caption changes
    nothing, each caption's swap is a fair coin. KID(champion) - KID(challenger) is *linear* in the
    coins s_i = +-1, so that its whole distribution follows from one number a caption:

    Formula: gain(s) = sum_i s_i d_i with, for champion's a_i, challenger's b_i and reference r,
        d_i = 1 / (n (n - 1)) sum_{j != i} [k(a_i, a_j) + k(a_i, b_j) - k(b_i, a_j) - k(b_i, b_j)]
              - 2 / (n m) sum_r [k(a_i, r) - k(b_i, r)].
        The terms with s_i s_j cancel: k(a_i, a_j) - k(b_i, b_j) needs equal signs,
        k(a_i, b_j) - k(b_i, a_j) unequal ones.

    Args:
        real: (M, F), the reference, the same for both.
        champion, challenger: (N, F), row by row the same captions and seeds, each of another true
            image: those of one image are no coins of their own.

    Raises:
        ValueError: the two are not of the same captions, or fewer than 3.
    """
    n, m = len(champion), len(real.at_most(MOST))
    if len(challenger) != n or min(n, m) < 3:
        raise ValueError(
            f"a paired test needs the same captions of both models and at least 3 images, not {n} "
            f"and {len(challenger)} images beside {m} of the reference"
        )
    real, a, b = real.at_most(MOST), champion.at_most(MOST), challenger.at_most(MOST)
    n = len(a)
    by_a, by_b = kernel_sums(a, b)
    itself = torch.cat([_same_row(x, y) for x, y in zip(a.blocks(), b.blocks(), strict=True)])
    among = own_sums(a) - own_sums(b) + (by_a - itself) - (by_b - itself)
    against = kernel_sums(a, real)[0] - kernel_sums(b, real)[0]
    parts = among / (n * (n - 1)) - 2 * against / (n * m)
    return _of_parts(parts, n)


def paired_shares(champion: Tensor, challenger: Tensor) -> Paired:
    """The mean of a score a caption, such as 1 where the caption was found: challenger's gain.

    Args:
        champion, challenger: (N,), the same captions.
    """
    n = len(champion)
    return _of_parts((challenger.double() - champion.double()) / n, n)


def _of_parts(parts: Tensor, n: int) -> Paired:
    """A gain that is the sum of one part a caption, under swaps that turn the parts' signs."""
    gain = float(parts.sum())
    if not math.isfinite(gain):
        raise ValueError(
            f"the two models cannot be compared: their difference is {gain}; features or images of "
            "one of them are not finite"
        )
    error = float((parts - parts.mean()).square().sum().mul(n / max(1, n - 1)).sqrt())
    generator = torch.Generator().manual_seed(0)
    rounding = 1e-12 * float(parts.abs().sum())  # of a sum in another order
    found = 1  # the swap that swaps nothing
    for _ in range(FLIPS // 1000):
        coins = torch.randint(0, 2, (1000, n), generator=generator, dtype=torch.int8)
        swapped = (2 * coins.double() - 1) @ parts.double()
        found += int((swapped >= gain - rounding).sum())
    needed = None
    if gain > 0:
        needed = max(3, round(n * ((1.959964 + 0.841621) * error / gain) ** 2))
    return Paired(
        gain=normal_interval(gain, error, n, "standard error over the captions"),
        error=error,
        p_value=found / (FLIPS + 1),
        needed=needed,
    )


def _same_row(a: Tensor, b: Tensor) -> Tensor:
    """k(a_i, b_i) of two blocks, (block,) float64."""
    return ((a.double() * b.double()).mean(1) + 1) ** 3

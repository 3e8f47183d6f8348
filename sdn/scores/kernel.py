"""KID: the kernel distance of two sets of features, over all their pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdn.scores.score import Score, normal_interval

if TYPE_CHECKING:
    from sdn.features.rows import Rows

MOST = 10_000
"""Rows of a set that are paired at most, spread evenly over it."""


def kernel_sums(first: Rows, second: Rows) -> tuple[Tensor, Tensor]:
    """Sums of the kernel over all pairs: by row of the first set, and by row of the second.

    Formula: k(a, b) = (<a, b> / F + 1)^3.
    Source: Binkowski et al. 2018, arXiv:1801.01401.

    Returns:
        (N,) and (M,) float64.
    """
    from torchmetrics.image.kid import poly_kernel

    by_first, by_second = [], torch.zeros(len(second), dtype=torch.float64)
    for a in first.blocks():
        rows, start = torch.zeros(len(a), dtype=torch.float64), 0
        for b in second.blocks():
            k = poly_kernel(a, b).double()  # (block, block)
            rows += k.sum(1)
            by_second[start : start + len(b)] += k.sum(0)
            start += len(b)
        by_first.append(rows)
    return torch.cat(by_first), by_second


def kid(real: Rows, fake: Rows) -> Score:
    """Kernel inception distance: unbiased squared MMD over all pairs, with a jackknife interval.

    The interval leaves out one image at a time, of both sets; a bootstrap with replacement would
    pair images with themselves and be biased.

    Args:
        real, fake: (N, F) and (M, F); `MOST` of each at most are used.

    Returns:
        Best 0; negative values are noise about 0. Withheld below 3 images a set.
    """
    real, fake = real.at_most(MOST), fake.at_most(MOST)
    n, m = len(real), len(fake)
    if min(n, m) < 3:
        return Score(count=m, withheld=f"KID needs at least 3 images a set, not {n} and {m}")
    own_real, own_fake = own_sums(real), own_sums(fake)
    cross_real, cross_fake = kernel_sums(real, fake)
    value = mmd(own_real.sum(), own_fake.sum(), cross_real.sum(), n, m)
    without_real = mmd(
        own_real.sum() - 2 * own_real, own_fake.sum(), cross_real.sum() - cross_real, n - 1, m
    )
    without_fake = mmd(
        own_real.sum(), own_fake.sum() - 2 * own_fake, cross_real.sum() - cross_fake, n, m - 1
    )
    variance = jackknife_variance(without_real) + jackknife_variance(without_fake)
    how = "jackknife over the images of both sets"
    return normal_interval(float(value), float(variance.sqrt()), m, how)


def own_sums(rows: Rows) -> Tensor:
    """(N,) float64: sums of the kernel of each row with all others of its set."""
    total, _ = kernel_sums(rows, rows)
    itself = torch.cat([(block.double().square().mean(1) + 1) ** 3 for block in rows.blocks()])
    return total - itself


def mmd(own_real: Tensor, own_fake: Tensor, cross: Tensor, n: int, m: int) -> Tensor:
    """Unbiased squared MMD of sums over pairs of different rows, within and between the sets."""
    return own_real / (n * (n - 1)) + own_fake / (m * (m - 1)) - 2 * cross / (n * m)


def jackknife_variance(without: Tensor) -> Tensor:
    """Variance of an estimate from its values with one observation left out each, (N,)."""
    n = len(without)
    return (n - 1) / n * (without - without.mean()).square().sum()

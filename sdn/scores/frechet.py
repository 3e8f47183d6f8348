"""FID: the Frechet distance of two sets of features, taken as normal distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdn.scores.kernel import jackknife_variance
from sdn.scores.score import Score, normal_interval

if TYPE_CHECKING:
    from sdn.features.rows import Rows

GROUPS = 10
"""Of images, each left out once for the interval."""

Moments = tuple[int, Tensor, Tensor]
"""Count, sum (F,) and sum of outer products (F, F), float64: sums of sets add up."""


def fid(real: Rows, fake: Rows) -> Score:
    """Frechet inception distance with a jackknife interval over groups of images.

    Formula: |m_r - m_f|^2 + tr(C_r + C_f - 2 (C_r C_f)^(1/2)).
    Source: Heusel et al. 2017, arXiv:1706.08500.

    Args:
        real, fake: (N, F) and (M, F).

    Returns:
        Best 0. Withheld where a set has fewer than 2 F images: its covariance is singular or nearly
        so, and the distance says more of the number of images than of the images.
    """
    least = min(len(real), len(fake))
    if least < 2 * real.dim:
        why = (
            f"FID needs at least {2 * real.dim} images a set, twice the {real.dim} numbers of a "
            f"feature vector; there are {len(real)} real and {len(fake)} others"
        )
        return Score(count=len(fake), withheld=why)
    moments_real, moments_fake = moments(real), moments(fake)
    value = distance(moments_real, moments_fake)
    # A group of each set is left out at once: the sets are independent, so their parts of the
    # variance add up.
    without = torch.tensor(
        [
            distance(
                _less(moments_real, moments(_group(real, group))),
                _less(moments_fake, moments(_group(fake, group))),
            )
            for group in range(GROUPS)
        ],
        dtype=torch.float64,
    )
    error = float(jackknife_variance(without).sqrt())
    how = f"jackknife over {GROUPS} groups of images"
    return normal_interval(value, error, len(fake), how, least=0.0)


def moments(rows: Rows) -> Moments:
    """Count, sum and sum of outer products of rows, read in blocks."""
    total = torch.zeros(rows.dim, dtype=torch.float64)
    outer = torch.zeros(rows.dim, rows.dim, dtype=torch.float64)
    for block in rows.blocks():
        x = block.double()
        total += x.sum(0)
        outer += x.T @ x
    return len(rows), total, outer


def distance(real: Moments, fake: Moments) -> float:
    """The distance of two sets with these moments; the formula is torchmetrics'."""
    from torchmetrics.image.fid import _compute_fid

    return float(_compute_fid(*_normal(real), *_normal(fake)))


def _normal(found: Moments) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance."""
    count, total, outer = found
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


def _less(whole: Moments, part: Moments) -> Moments:
    return whole[0] - part[0], whole[1] - part[1], whole[2] - part[2]


def _group(rows: Rows, number: int) -> Rows:
    n = len(rows)
    return rows.part(number * n // GROUPS, (number + 1) * n // GROUPS)

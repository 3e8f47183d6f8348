"""Improved precision and recall: which share of one set lies within the manifold of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdn.scores.kernel import MOST
from sdn.scores.score import Score, of_share

if TYPE_CHECKING:
    from sdn.features.rows import Rows

NEIGHBOURS = 3
_BLOCK = 1024


def precision_recall(real: Rows, fake: Rows) -> tuple[Score, Score]:
    """Precision: share of the fake images within the real manifold. Recall: the other way round.

    A set's manifold is the union of balls about its images that reach to their 3rd neighbour.
    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991.

    Args:
        real, fake: (N, F) and (M, F); `MOST` of each at most are used.

    Returns:
        Two shares, 0..1, best 1. Withheld below 4 images a set.
    """
    real, fake = real.at_most(MOST), fake.at_most(MOST)
    if min(len(real), len(fake)) <= NEIGHBOURS:
        why = f"needs more than {NEIGHBOURS} images a set, not {len(real)} and {len(fake)}"
        return Score(count=len(fake), withheld=why), Score(count=len(real), withheld=why)
    radii_real, radii_fake = _radii(real), _radii(fake)
    return _within(fake, real, radii_real), _within(real, fake, radii_fake)


def _radii(rows: Rows) -> Tensor:
    """(N,) distance of each row to its 3rd neighbour in its own set."""
    found = []
    for start in range(0, len(rows), _BLOCK):
        a = rows.read(start, start + _BLOCK)
        near = torch.full((len(a), NEIGHBOURS + 1), float("inf"))
        for b in rows.blocks(_BLOCK):
            distances = torch.cdist(a, b)
            both = torch.cat([near, distances], dim=1)
            near = both.topk(NEIGHBOURS + 1, dim=1, largest=False).values
        found.append(near[:, -1])  # the nearest is the row itself
    return torch.cat(found)


def _within(rows: Rows, manifold: Rows, radii: Tensor) -> Score:
    inside = 0
    for a in rows.blocks(_BLOCK):
        hit, start = torch.zeros(len(a), dtype=torch.bool), 0
        for b in manifold.blocks(_BLOCK):
            hit |= (torch.cdist(a, b) <= radii[start : start + len(b)]).any(1)
            start += len(b)
        inside += int(hit.sum())
    return of_share(inside / len(rows), len(rows))

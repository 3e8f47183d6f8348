"""Caption match: how often a judge finds an image's own caption among others (R-precision)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sdn.captions import normalise
from sdn.scores.score import Score, of_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sdn.features.rows import Rows
    from sdn.judge import Judge

MISMATCHED = 99
"""Captions of other images beside an image's own."""
_BLOCK = 256


def mismatched(captions: Sequence[str], others: Sequence[str], seed: int = 0) -> Tensor | None:
    """For each caption the rows of 99 others that do not say the same.

    Args:
        captions: Q of them.
        others: to choose among: the captions of the test split, then of others.
        seed: of the draw.

    Returns:
        (Q, 99) int64 rows of `others`, or None where they hold too few different ones.
    """
    told = [normalise(caption) for caption in others]
    distinct = np.array(list({text: row for row, text in reversed(list(enumerate(told)))}.values()))
    if len(distinct) <= MISMATCHED:
        return None
    generator = np.random.default_rng(seed)
    found = np.empty((len(captions), MISMATCHED), np.int64)
    for row, caption in enumerate(captions):
        drawn = generator.choice(distinct, MISMATCHED + 1, replace=False)
        own = normalise(caption)
        found[row] = [other for other in drawn if told[other] != own][:MISMATCHED]
    return torch.from_numpy(found)


@torch.no_grad()
def found_captions(
    judge: Judge, features: Rows, captions: Sequence[str], others: Sequence[str], chosen: Tensor
) -> Tensor:
    """(Q,) float32: 1 where the own caption fits an image better than each of the mismatched.

    Args:
        judge: see `sdn.judge`.
        features: (Q, F) of the images.
        captions: Q, their own.
        others: captions that `chosen` names.
        chosen: (Q, 99) from `mismatched`.
    """
    known = torch.cat(
        [judge.of_captions(others[i : i + _BLOCK]) for i in range(0, len(others), _BLOCK)]
    )
    found, start = [], 0
    for block in features.blocks(_BLOCK):
        stop = start + len(block)
        images = judge.of_features(block)
        own = (images * judge.of_captions(captions[start:stop])).sum(1)
        rivals = torch.einsum("be,bne->bn", images, known[chosen[start:stop]])
        found.append((own.unsqueeze(1) > rivals).all(1).float())
        start = stop
    return torch.cat(found)


def r_precision(found: Tensor) -> Score:
    """The share of captions found, 0..1; chance is 1%.

    Source: Xu et al. 2018, arXiv:1711.10485 (AttnGAN), with R = 1.

    Args:
        found: from `found_captions`.
    """
    return of_share(float(found.double().mean()), len(found))

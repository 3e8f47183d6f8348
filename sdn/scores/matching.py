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


def mismatched(
    captions: Sequence[str],
    others: Sequence[str],
    seed: int = 0,
    images: Sequence[int] | None = None,
) -> Tensor | None:
    """For each caption the rows of 99 others that do not say the same and are of other images.

    Args:
        captions: Q of them.
        others: to choose among: the captions of the test split, then of others.
        seed: of the draw.
        images: Q numbers, the same for captions of one image; None where each is of its own.

    Returns:
        (Q, 99) int64 rows of `others`, or None where they hold too few different ones.
    """
    told = [normalise(caption) for caption in others]
    distinct = np.array(list({text: row for row, text in reversed(list(enumerate(told)))}.values()))
    numbers = range(len(captions)) if images is None else images
    own: dict[int, set[str]] = {}
    for caption, image in zip(captions, numbers, strict=True):
        own.setdefault(image, set()).add(normalise(caption))
    size = MISMATCHED + max(map(len, own.values()), default=0)  # so that 99 are left in any case
    if len(distinct) < size:
        return None
    generator = np.random.default_rng(seed)
    found = np.empty((len(captions), MISMATCHED), np.int64)
    for row, image in enumerate(numbers):
        drawn = generator.choice(distinct, size, replace=False)
        found[row] = [other for other in drawn if told[other] not in own[image]][:MISMATCHED]
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


def r_precision(found: Tensor, independent: int | None = None) -> Score:
    """The share of captions found, 0..1; chance is 1%.

    Source: Xu et al. 2018, arXiv:1711.10485 (AttnGAN), with R = 1.

    Args:
        found: from `found_captions`.
        independent: different images among them; None for all.
    """
    return of_share(float(found.double().mean()), len(found), independent)

"""Diversity: how far the images of a set lie apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdn.scores.score import Score, normal_interval

if TYPE_CHECKING:
    from torch import Tensor

    from sdn.features.rows import Rows


def diversity(rows: Rows, seed: int = 0) -> Score:
    """Mean Euclidean distance of two images of the set, over pairs that share no image.

    In the unit of the feature network: to be read beside the real images' own.

    Args:
        rows: (N, F).
        seed: of the pairs.

    Returns:
        >= 0; withheld below 4 images.
    """
    n = len(rows)
    if n < 4:
        return Score(count=n, withheld=f"diversity needs at least 4 images, not {n}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for start in range(0, n - n % 2, 512):
        pairs = rows.take(order[start : min(start + 512, n - n % 2)])
        found.append((pairs[0::2] - pairs[1::2]).double().norm(dim=1))
    distances = torch.cat(found)
    error = float(distances.std() / len(distances) ** 0.5)
    how = "standard error over pairs of different images"
    return normal_interval(float(distances.mean()), error, n, how, least=0.0)


def apart(one: Rows, other: Rows) -> Tensor:
    """(N,) float64 Euclidean distance of the rows of two sets, both (N, F), place by place."""
    found = [
        (one.read(start, stop) - other.read(start, stop)).double().norm(dim=1)
        for start in range(0, len(one), 512)
        for stop in [min(start + 512, len(one))]
    ]
    return torch.cat(found)


def caption_diversity(distances: Tensor) -> Score:
    """Mean distance of two images of one caption that differ in their noise.

    In the unit of the feature network: to be read beside the `diversity` of real images that are
    of one class.

    Args:
        distances: (N,), one a caption, see `apart`.

    Returns:
        >= 0; withheld below 2 captions.
    """
    n = len(distances)
    if n < 2:
        return Score(count=n, withheld=f"caption diversity needs at least 2 captions, not {n}")
    error = float(distances.std() / n**0.5)
    how = "standard error over captions"
    return normal_interval(float(distances.mean()), error, n, how, least=0.0)

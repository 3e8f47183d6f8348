"""Retrieval: how often the nearest image of the whole data set is the true one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdn.scores.score import Score, of_share

if TYPE_CHECKING:
    from sdn.features.rows import Rows

_QUERIES = 256
_DOUBT = 1e-5
"""Difference of two squared distances, in shares of the squared lengths of the vectors, below which
float32 is not trusted with their order; ten times the largest error that was seen."""
_PAIRS = 4096


def true_image_ranks(queries: Rows, gallery: Rows, truth: Tensor, first: Tensor) -> Tensor:
    """Rank of each query's true image among all different images, by Euclidean distance.

    Args:
        queries: (Q, F), features of the images to score.
        gallery: (N, F), features of the images of the data set.
        truth: (Q,) int64, row of each query's true image in the gallery, already the `first` of
            its like.
        first: (N,) bool, False for an image that is equal, pixel by pixel, to an earlier one.

    Returns:
        (Q,) int64, 1 is best.

    Raises:
        ValueError: no queries.
    """
    if len(queries) == 0:
        raise ValueError("retrieval needs at least one query; the split is empty")
    found, start = [], 0
    for block in queries.blocks(_QUERIES):
        x, own_rows = block, truth[start : start + len(block)]
        own = _exact(x, gallery.take(own_rows.tolist()))
        length = x.square().sum(1, keepdim=True)
        nearer, seen = torch.zeros(len(x), dtype=torch.int64), 0
        for other in gallery.blocks():
            rough = torch.cdist(x, other)
            closer = rough < own.unsqueeze(1)
            # Rounding could decide these: they are looked at again, one by one.
            apart = (rough.square() - own.square().float().unsqueeze(1)).abs_()
            which = (apart <= _DOUBT * (length + other.square().sum(1))).nonzero()
            for part in torch.split(which, _PAIRS):
                query, image = part.unbind(1)
                closer[query, image] = _exact(x[query], other[image]) < own[query]
            closer &= first[seen : seen + len(other)]
            here = (own_rows >= seen) & (own_rows < seen + len(other))
            closer[here.nonzero().flatten(), own_rows[here] - seen] = False  # not before itself
            nearer += closer.sum(1)
            seen += len(other)
        found.append(1 + nearer)
        start += len(x)
    return torch.cat(found)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """(N,) float64 distances row by row."""
    found: Tensor = (a.double() - b.double()).norm(dim=1)
    return found


def retrieval_scores(ranks: Tensor, independent: int | None = None) -> dict[str, Score]:
    """`top1_score`, `top5_score`, `reciprocal_rank_score` (0..1) and `median_rank` (1 is best).

    Args:
        ranks: from `true_image_ranks`.
        independent: different images among the queries; None for all.
    """
    from scipy.stats import quantile_test

    n = len(ranks)
    inverse = 1 / ranks.double()
    error = float(inverse.std()) / (independent or n) ** 0.5 if n > 1 else 0.0
    mean = float(inverse.mean())
    between = quantile_test(ranks.numpy(), q=1.0, p=0.5).confidence_interval(0.95)
    return {
        "top1_score": of_share(float((ranks == 1).double().mean()), n, independent),
        "top5_score": of_share(float((ranks <= 5).double().mean()), n, independent),
        "reciprocal_rank_score": Score(
            value=mean,
            low=max(0.0, mean - 1.96 * error),
            high=min(1.0, mean + 1.96 * error),
            interval="standard error over captions",
            count=n,
        ),
        "median_rank": Score(
            value=float(ranks.double().quantile(0.5)),
            low=_finite(between.low, 1.0),
            high=_finite(between.high, float(ranks.max())),
            interval="order statistics (binomial)",
            count=n,
        ),
    }


def _finite(value: float, instead: float) -> float:
    return float(value) if value == value and abs(value) != float("inf") else instead  # noqa: PLR0124

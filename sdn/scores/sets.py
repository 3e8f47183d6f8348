"""All scores that compare one set of images with another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdn.scores.diversity import diversity
from sdn.scores.frechet import fid
from sdn.scores.kernel import kid
from sdn.scores.manifold import precision_recall

if TYPE_CHECKING:
    from sdn.features.rows import Rows

SetScores = dict[str, dict[str, Any]]
"""Score name -> `Score.as_dict()`."""


def score_sets(real: Rows, fake: Rows) -> SetScores:
    """`kid_error`, `fid_error`, `precision_score`, `recall_score` and `diversity_score`.

    Args:
        real: (N, F), the reference.
        fake: (M, F), the set that is scored.
    """
    precision, recall = precision_recall(real, fake)
    return {
        "kid_error": kid(real, fake).as_dict(),
        "fid_error": fid(real, fake).as_dict(),
        "precision_score": precision.as_dict(),
        "recall_score": recall.as_dict(),
        "diversity_score": diversity(fake).as_dict(),
    }

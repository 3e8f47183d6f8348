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


def score_sets(real: Rows, fake: Rows, independent: Rows | None = None) -> SetScores:
    """`kid_error`, `fid_error`, `precision_score`, `recall_score` and `diversity_score`.

    Args:
        real: (N, F), the reference.
        fake: (M, F), the set that is scored.
        independent: those of the set that are of different images, where it has several of one
            (captions of the same image): all scores but FID are of these, for their intervals are
            those of independent images. None for all.
    """
    single = fake if independent is None else independent
    precision, recall = precision_recall(real, single)
    return {
        "kid_error": kid(real, single).as_dict(),
        "fid_error": fid(real, fake).as_dict(),
        "precision_score": precision.as_dict(),
        "recall_score": recall.as_dict(),
        "diversity_score": diversity(single).as_dict(),
    }

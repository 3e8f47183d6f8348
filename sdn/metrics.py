"""Scores of generated images. `*_score` is better when higher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from sdn.data.images import to_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdn.teacher import Teacher

SIDE = 32
"""Height and width at which images are compared in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrieval:
    """How often the nearest image of the whole data set is the true one."""

    top1_score: float
    """Share of queries whose nearest image is the true one, 0..1."""
    top5_score: float
    """Share of queries with the true one among the five nearest, 0..1."""
    median_rank: float
    """1 is best."""
    reciprocal_rank_score: float
    """Mean of 1 / rank, 0..1."""
    top1_low: float
    """Lower end of the 95% interval of top 1 (Wilson)."""
    top1_high: float
    """Upper end of it."""
    queries: int


def pixel_features(pixels: Tensor) -> Tensor:
    """Images as vectors at 32x32: each value the mean over the area it stands for.

    Args:
        pixels: (N, 3, H, W) uint8.

    Returns:
        (N, 3072) float32 in [-1, 1].
    """
    return functional.interpolate(to_image(pixels), (SIDE, SIDE), mode="area").flatten(1)


@torch.inference_mode()
def tap_features(teacher: Teacher, pixels: Tensor, batch: int = 64) -> Tensor:
    """Images as vectors in the teacher: each pool, spatially down to 2x2, to unit length, joined.

    Args:
        teacher: frozen.
        pixels: (N, 3, H, W) uint8.
        batch: images at a time.

    Returns:
        (N, F) float32.
    """
    pools = [name for name in teacher.names if name.startswith("pool")]
    rows = []
    for start in range(0, len(pixels), batch):
        taps = teacher(to_image(pixels[start : start + batch]), pools)
        vectors = [functional.adaptive_avg_pool2d(t.float(), 2).flatten(1) for t in taps.values()]
        rows.append(torch.cat([functional.normalize(v, dim=1) for v in vectors], dim=1))
    return torch.cat(rows).clone()


def identity_groups(pixels: Tensor) -> Tensor:
    """(N,) int64: the same number for images that are equal pixel by pixel.

    Args:
        pixels: (N, 3, H, W) uint8.
    """
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(row.numpy().tobytes(), len(numbers)) for row in pixels])


def retrieval(
    queries: Tensor, gallery: Tensor, truth: Tensor, groups: Tensor | None = None
) -> Retrieval:
    """Rank of each query's true image among all images by Euclidean distance.

    Args:
        queries: (Q, F), features of the images to score.
        gallery: (N, F), features of all images of the data set.
        truth: (Q,) int64, row of each query's true image in the gallery.
        groups: (N,) from `identity_groups`: identical images count as one.

    Raises:
        ValueError: no queries.
    """
    if len(queries) == 0:
        raise ValueError("retrieval needs at least one query; the split is empty")
    groups = torch.arange(len(gallery)) if groups is None else groups
    first = torch.full((int(groups.max()) + 1,), len(gallery))
    first.scatter_reduce_(0, groups, torch.arange(len(gallery)), "amin")
    distances = torch.cdist(queries.double(), gallery[first].double())  # (Q, groups)
    own = distances.gather(1, groups[truth].unsqueeze(1))
    ranks = 1 + (distances < own).sum(1)
    top1 = (ranks == 1).double().mean().item()
    low, high = wilson(top1, len(ranks))
    return Retrieval(
        top1_score=top1,
        top5_score=(ranks <= 5).double().mean().item(),
        median_rank=float(ranks.double().quantile(0.5)),
        reciprocal_rank_score=(1 / ranks.double()).mean().item(),
        top1_low=low,
        top1_high=high,
        queries=len(ranks),
    )


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share observed `count` times.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    centre = share + z**2 / (2 * count)
    spread = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    scale = 1 + z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def blurred(pixels: Tensor, side: int) -> Tensor:
    """Box blur with a window of `side` x `side` pixels, borders repeated.

    Args:
        pixels: (N, 3, H, W) uint8.
        side: odd.
    """
    margin = side // 2
    padded = functional.pad(pixels.float(), (margin,) * 4, mode="replicate")
    return functional.avg_pool2d(padded, side, stride=1).round().to(torch.uint8)


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int, subset_size: int, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance of two sets of features: mean and deviation over subsets.

    Formula: MMD^2 with k(a, b) = (<a, b> / F + 1)^3; the mean over subsets drawn without
        replacement.
    Source: Binkowski et al. 2018, arXiv:1801.01401 (KID; the kernel is torchmetrics').

    Args:
        real, fake: (N, F) and (M, F).
        subsets: > 1.
        subset_size: at most N and M are used.
        seed: of the subsets.

    Returns:
        (mean, deviation over the subsets); best 0, may be negative.
    """
    from torchmetrics.image.kid import poly_mmd

    generator = torch.Generator().manual_seed(seed)
    size = min(subset_size, len(real), len(fake))
    found = []
    for _ in range(subsets):
        a = real[torch.randperm(len(real), generator=generator)[:size]]
        b = fake[torch.randperm(len(fake), generator=generator)[:size]]
        found.append(poly_mmd(a, b))
    values = torch.stack(found)
    return values.mean().item(), values.std().item()


def probe_accuracy(
    train: Tensor, train_classes: Sequence[str], held_out: Tensor, classes: Sequence[str]
) -> float:
    """Share of held-out rows whose class a linear probe reads off the embedding, 0..1.

    Args:
        train, held_out: (N, D) and (M, D).
        train_classes, classes: of the same rows.
    """
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(max_iter=300, C=1.0)
    probe.fit(train.numpy(), list(train_classes))
    return float(probe.score(held_out.numpy(), list(classes)))

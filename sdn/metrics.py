"""What scores are computed from: images as vectors, which of them are equal, blurs, probes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from sdn.data.images import to_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdn.teacher import FastTeacher, Teacher

SIDE = 32
"""Height and width at which images are compared in pixels."""


def pixel_features(pixels: Tensor) -> Tensor:
    """Images as vectors at 32x32: each value the mean over the area it stands for.

    Args:
        pixels: (N, 3, H, W) uint8.

    Returns:
        (N, 3072) float32 in [-1, 1].
    """
    return functional.interpolate(to_image(pixels), (SIDE, SIDE), mode="area").flatten(1)


@torch.inference_mode()
def tap_features(
    teacher: Teacher | FastTeacher,
    pixels: Tensor,
    batch: int = 64,
    device: torch.device | None = None,
    report: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """Images as vectors in the teacher: each pool, spatially down to 2x2, to unit length, joined.

    Args:
        teacher: frozen.
        pixels: (N, 3, H, W) uint8, on the CPU.
        batch: images at a time.
        device: of the teacher; None is the CPU.
        report: called with the number of images done.

    Returns:
        (N, F) float32, on the CPU.
    """
    pools = [name for name in teacher.names if name.startswith("pool")]
    rows = []
    for start in range(0, len(pixels), batch):
        taps = teacher(to_image(pixels[start : start + batch].to(device)), pools)
        vectors = [functional.adaptive_avg_pool2d(t.float(), 2).flatten(1) for t in taps.values()]
        rows.append(torch.cat([functional.normalize(v, dim=1) for v in vectors], dim=1).cpu())
        report(min(start + batch, len(pixels)))
    return torch.cat(rows).clone()


def first_alike(pixels: Tensor) -> Tensor:
    """(N,) int64: the row of the first image that is equal pixel by pixel, its own where it is new.

    Args:
        pixels: (N, 3, H, W) uint8.
    """
    rows: dict[bytes, int] = {}
    return torch.tensor([rows.setdefault(one.numpy().tobytes(), n) for n, one in enumerate(pixels)])


def blurred(pixels: Tensor, side: int) -> Tensor:
    """Box blur with a window of `side` x `side` pixels, borders repeated.

    Args:
        pixels: (N, 3, H, W) uint8.
        side: odd.
    """
    margin = side // 2
    padded = functional.pad(pixels.float(), (margin,) * 4, mode="replicate")
    return functional.avg_pool2d(padded, side, stride=1).round().to(torch.uint8)


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

"""Synthetic images as their pixels will be, for what learns by looking at them.

Departs from the paper, whose teacher reads the synthesis unclamped: white is one exact value there,
which no student draws without noise about it, and features tell that from white. Clamped, whatever
lies above it is white.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MARGIN = 0.25
"""How far out of range an image may lie: what lies further out is drawn back to there."""


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor) -> Tensor:
        ctx.save_for_backward(image)
        return image.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (image,) = ctx.saved_tensors
        # A step goes against the gradient. Drawing back from the very border would bring white
        # down to it, where half of the noise shows.
        high = (image > 1) & ((gradient < 0) | (image < 1 + MARGIN))
        low = (image < -1) & ((gradient > 0) | (image > -1 - MARGIN))
        found: Tensor = gradient.masked_fill(high | low, 0)
        return found


def clamped(image: Tensor) -> Tensor:
    """An image clamped to what pixels can show.

    Formula: clamp(x, -1, 1), whose gradient g at |x| > 1 is g where |x| >= 1 + MARGIN and a step
    against g leads back, and 0 elsewhere; g is that of all losses that read this
    clamped image together. So a value between 1
    and 1 + MARGIN learns through the weights that it shares with others alone.

    Args:
        image: (B, 3, H, W), nominally in [-1, 1].

    Returns:
        (B, 3, H, W) in [-1, 1].
    """
    found: Tensor = _Clamped.apply(image)  # type: ignore[no-untyped-call]
    return found

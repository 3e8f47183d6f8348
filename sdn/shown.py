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
"""How far out of range an image may stay: what lies further out is drawn back."""


class _Shown(torch.autograd.Function):
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


def shown(image: Tensor) -> Tensor:
    """An image clamped to what pixels can show.

    Its gradient is 0 where it is out of range, but for what leads back from further out than
    `MARGIN`: an image that is white all over could never learn otherwise.

    Args:
        image: (B, 3, H, W), nominally in [-1, 1].

    Returns:
        (B, 3, H, W) in [-1, 1].
    """
    found: Tensor = _Shown.apply(image)  # type: ignore[no-untyped-call]
    return found

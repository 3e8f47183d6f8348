"""Chroma coarser than brightness, as photos have it and as JPEG keeps it.

Departs from the paper: a student leaves fine coloured noise in that its teacher hardly minds; other
networks see it (DECISIONS.md, 2026-11-28, measured on a teacher that was fed too faintly).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in brightness. Source: ITU-R BT.601, as JPEG has it."""


def subsampled(image: Tensor, factor: int) -> Tensor:
    """An image whose chroma was subsampled; its brightness stays, until somebody clamps it.

    Formula: y + up(mean(x - y)), y the brightness of x, mean over squares of `factor` pixels a
    side, up bilinear. The same as subsampling Cb and Cr, which are linear in x - y.

    Args:
        image: (B, 3, H, W), any range, linear in what a pixel stores.
        factor: that divides H and W; 1 leaves the image as it is.

    Returns:
        (B, 3, H, W) of the same type; values may leave the range of the image's.
    """
    if factor == 1:
        return image
    # In bf16 a grey near white would be off by 0.3 in 255, and it is slower there.
    exact = image if image.dtype == torch.float64 else image.float()
    red, green, blue = (share * exact[:, n : n + 1] for n, share in enumerate(_LUMA))
    brightness = red + green + blue
    coarse = functional.avg_pool2d(exact - brightness, factor)
    fine = functional.interpolate(coarse, scale_factor=factor, mode="bilinear", align_corners=False)
    return (brightness + fine).to(image.dtype)

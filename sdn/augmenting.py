"""Differentiable augmentation: what critics see is changed, real and synthetic images alike.

Departs from the paper: it has neither critics nor augmentation. Critics that see few images learn
these by heart; changed in ways that a gradient passes through, the images stay fresh and the
student still learns of each change what it must undo.
Source: Zhao et al. 2020, arXiv:2006.10738 (colour, translation, cutout).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdn.noise import uniform_rows

NUMBERS = 7
"""Random numbers that one image's change takes."""
_SHIFT, _HOLE = 1 / 8, 1 / 2
"""Largest translation and side of the hole (which is a pixel less), as shares of the image's."""


def change_of(names: list[str], *, seed: int) -> Tensor:
    """What is to be done to each image: (B, NUMBERS) in [0, 1), a function of name and seed."""
    return uniform_rows(names, NUMBERS, seed=seed, of="augmentation")


def augmented(image: Tensor, change: Tensor) -> Tensor:
    """The images with other colours, moved, and with a hole.

    Args:
        image: (B, 3, H, W), RGB, in [-1, 1].
        change: (B, NUMBERS) in [0, 1); the same numbers do the same to any image.

    Returns:
        (B, 3, H, W), float32 or the type of the image if that is finer; what moves in from outside
        and the hole are 0, mid-grey; gradients pass.
    """
    # Not in the image's type: in bfloat16 these numbers round, and a synthetic image would have its
    # hole elsewhere than the float32 real one beside it.
    change = change.to(image.device)
    return _holed(_moved(_coloured(image, change[:, :3]), change[:, 3:5]), change[:, 5:7])


def _coloured(image: Tensor, change: Tensor) -> Tensor:
    brightness, saturation, contrast = (one.view(-1, 1, 1, 1) for one in change.unbind(1))
    x = image + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def _moved(image: Tensor, change: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    rows = _offsets(change[:, 0], height, _SHIFT)
    columns = _offsets(change[:, 1], width, _SHIFT)
    y = torch.arange(height, device=image.device) + rows.view(-1, 1)  # (B, H): read from
    x = torch.arange(width, device=image.device) + columns.view(-1, 1)
    inside = ((y >= 0) & (y < height)).view(-1, 1, height, 1) & ((x >= 0) & (x < width)).view(
        -1, 1, 1, width
    )
    batch = torch.arange(len(image), device=image.device).view(-1, 1, 1)
    y, x = y.clamp(0, height - 1).unsqueeze(2), x.clamp(0, width - 1).unsqueeze(1)
    return image.permute(0, 2, 3, 1)[batch, y, x].permute(0, 3, 1, 2) * inside


def _holed(image: Tensor, change: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    y = torch.arange(height, device=image.device) - (change[:, 0] * height).long().view(-1, 1)
    x = torch.arange(width, device=image.device) - (change[:, 1] * width).long().view(-1, 1)
    hole = (y.abs() < height * _HOLE / 2).view(-1, 1, height, 1) & (
        x.abs() < width * _HOLE / 2
    ).view(-1, 1, 1, width)
    return image * ~hole


def _offsets(change: Tensor, side: int, share: float) -> Tensor:
    """Whole pixels in [-share * side, share * side]."""
    most = int(side * share)
    return (change * (2 * most + 1)).long() - most

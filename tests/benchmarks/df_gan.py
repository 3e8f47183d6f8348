"""DF-GAN's generator, untrained: what `sampling.py --df-gan` compares a student's rate with.

Source: Tao et al., "DF-GAN: A Simple and Effective Baseline for Text-to-Image Synthesis", CVPR
2022, arXiv:2008.05865; sizes of its release (nf 32, noise of 100 and text of 256 numbers).
"""

from __future__ import annotations

from itertools import pairwise
from math import log2

import torch
from torch import Tensor, nn
from torch.nn import functional

NOISE, TEXT, WIDTH = 100, 256, 32
"""Numbers of noise and of text, and channels at full resolution."""
_SMALLEST = 4
"""Pixels a side that blocks begin at."""
_MOST = 8
"""Most channels, in units of WIDTH."""
_SLOPE = 0.2


class Modulation(nn.Module):
    """Twice: scale and shift each channel by what the code says, then a leaky ReLU."""

    def __init__(self, code: int, channels: int) -> None:
        super().__init__()
        self.readings = nn.ModuleList(
            nn.Sequential(nn.Linear(code, channels), nn.ReLU(), nn.Linear(channels, channels))
            for _ in range(4)
        )

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """(B, C, H, W), (B, code) -> (B, C, H, W)."""
        for scale, shift in (self.readings[:2], self.readings[2:]):
            scaled = scale(code)[:, :, None, None] * x + shift(code)[:, :, None, None]
            x = functional.leaky_relu(scaled, _SLOPE, inplace=True)
        return x


class Block(nn.Module):
    """Upsampling, and two convolutions beside a shortcut."""

    def __init__(self, code: int, before: int, after: int) -> None:
        super().__init__()
        self.modulations = nn.ModuleList([Modulation(code, before), Modulation(code, after)])
        self.convs = nn.ModuleList(
            [nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)]
        )
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """(B, before, H, W), (B, code) -> (B, after, 2H, 2W)."""
        h = x = functional.interpolate(x, scale_factor=2)
        for modulation, conv in zip(self.modulations, self.convs, strict=True):
            h = conv(modulation(h, code))
        return self.shortcut(x) + h


class Generator(nn.Module):
    """Noise and text -> image, by blocks from 4 px up."""

    def __init__(self, resolution: int) -> None:
        """Args:
        resolution: of the image, a power of two, > 4.
        """
        super().__init__()
        layers = round(log2(resolution)) - 1
        widths = [WIDTH * min(2**n, _MOST) for n in reversed(range(layers))]
        self.first = nn.Linear(NOISE, WIDTH * _MOST * _SMALLEST**2)
        self.blocks = nn.ModuleList(Block(NOISE + TEXT, *pair) for pair in pairwise(widths))
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        """(B, 356), noise first -> (B, 3, H, W) in [-1, 1]."""
        x = self.first(code[:, :NOISE]).unflatten(1, (-1, _SMALLEST, _SMALLEST))
        for block in self.blocks:
            x = block(x, code)
        return torch.tanh(self.last(functional.leaky_relu(x, _SLOPE)))

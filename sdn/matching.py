"""How well an image fits its caption beside other captions, as a reading of the teacher's taps.

Departs from the paper: critics ask of an image and a caption alone; what tells one caption from
others like it is learned faster where they are compared.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdn.student import Taps

_SIDE = 2
"""Height and width to which a tap is averaged, as in the fit of the caption encoder."""


class Matcher(nn.Module):
    """Taps of an image, and the embedding of a caption, as two vectors that can be compared.

    Both readings are linear: what they cannot tell apart, the teacher does not tell apart plainly.
    Source: Zhang et al. 2021, arXiv:2101.04702 (a contrastive reading of the discriminator's
    features that learns from real images, and that the generator is taught by).
    """

    def __init__(
        self, channels: Mapping[str, int], *, text_dim: int, dim: int, generator: torch.Generator
    ) -> None:
        """Args:
        channels: tap name -> its channels, of the taps that are read.
        text_dim: D.
        dim: length of the vectors.
        generator: of the initial weights.
        """
        super().__init__()
        self.taps = tuple(channels)
        self.image = nn.Linear(sum(channels.values()) * _SIDE**2, dim)
        self.text = nn.Linear(text_dim, dim)
        for layer in (self.image, self.text):
            deviation = 1 / math.sqrt(layer.in_features)
            nn.init.normal_(layer.weight, 0, deviation, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, taps: Taps, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, E) float32 each, of the images and of the captions.

        Args:
            taps: tap name -> (B, C, H, W).
            text: (B, D).
        """
        with torch.autocast(text.device.type, enabled=False):
            found = [
                functional.adaptive_avg_pool2d(taps[name].float(), _SIDE).flatten(1)
                for name in self.taps
            ]
            even = [functional.layer_norm(one, one.shape[1:]) for one in found]
            return self.image(torch.cat(even, dim=1)), self.text(text)

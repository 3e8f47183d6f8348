"""How well an image fits its caption beside other captions, as a reading of the teacher's taps.

Departs from the paper: critics ask of an image and a caption alone; what tells one caption from
others like it is learned faster where they are compared.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdn.student import Taps

_SIDE = 2
"""Height and width to which a tap is averaged, as in the fit of the caption encoder."""
_MEMORY = 1024
"""Captions that are remembered: few images of a batch have captions that are easily mistaken."""


_TEMPERATURE = 0.1


class Vectors(NamedTuple):
    """Of images and captions, to be compared."""

    images: Tensor
    """(B, E)."""
    words: Tensor
    """(B, E), of their captions."""
    others: Tensor
    """(M, E), of the captions that are remembered."""


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
        self.memory: Tensor
        self.remembered: Tensor
        self.taps = tuple(channels)
        self.image = nn.Linear(sum(channels.values()) * _SIDE**2, dim)
        self.text = nn.Linear(text_dim, dim)
        for layer in (self.image, self.text):
            deviation = 1 / math.sqrt(layer.in_features)
            nn.init.normal_(layer.weight, 0, deviation, generator=generator)
            nn.init.zeros_(layer.bias)
        self.register_buffer("memory", torch.zeros(_MEMORY, text_dim))
        self.register_buffer("remembered", torch.zeros((), dtype=torch.int64))

    def forward(self, taps: Taps, text: Tensor) -> Vectors:
        """What can be compared, float32.

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
            return Vectors(
                self.image(torch.cat(even, dim=1)), self.text(text), self.text(self.known())
            )

    def known(self) -> Tensor:
        """(M, D), the embeddings that are remembered."""
        return self.memory[: int(self.remembered)]

    def remember(self, text: Tensor) -> None:
        """Have (N, D) embeddings among those that later images are compared with."""
        kept = torch.cat([text, self.known()])[:_MEMORY]
        self.memory[: len(kept)] = kept
        self.remembered.fill_(len(kept))


def match_loss(images: Tensor, words: Tensor, others: Tensor, same: Tensor) -> Tensor:
    """Which of many captions an image fits, and which of the images a caption.

    Formula: -log softmax over the captions, at an image's own, of their cosines / 0.1, and the same
        over the images at a caption's own; the mean of both.
    Source: Zhang et al. 2021, arXiv:2101.04702; captions of earlier steps as further candidates
        after He et al. 2020, arXiv:1911.05722.

    Args:
        images, words: (N, E), row by row of one sample.
        others: (M, E), further captions.
        same: (N, N + M) bool, the captions that are not candidates for an image, for they are equal
            to its own.

    Returns:
        scalar float32, >= 0; best 0.
    """
    images, words = functional.normalize(images, dim=1), functional.normalize(words, dim=1)
    captions = torch.cat([words, functional.normalize(others, dim=1)])
    scores = (images @ captions.T / _TEMPERATURE).masked_fill(same, -torch.inf)
    target = torch.arange(len(images), device=images.device)
    back = scores[:, : len(images)].T
    found = functional.cross_entropy(scores, target) + functional.cross_entropy(back, target)
    return found / 2

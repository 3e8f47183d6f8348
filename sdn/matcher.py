"""The matcher: where the teacher's features of an image and the embedding of its caption meet.

Fitting the caption encoder makes it; stage three may ask it whether an image shows what its caption
says. The teacher stays the only source of vision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdn.tensor_files import damaged, read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from sdn.taps import Blocks

MATCHER = "matcher.safetensors"
"""Beside the caption encoder."""
TEMPERATURE = 0.1
"""Of the softmax over captions, as of `sdn.captions.contrastive_loss`."""
_PLACES = 2
"""Height and width of a pool as a feature."""


def pools_of(names: Iterable[str]) -> tuple[str, ...]:
    """The taps that features are made of."""
    return tuple(name for name in names if name.startswith("pool"))


def feature_count(blocks: Blocks) -> int:
    """F, of a teacher of these blocks."""
    return sum(channels for channels, _ in blocks) * _PLACES**2


def features_of(pools: Mapping[str, Tensor]) -> Tensor:
    """Each pool, spatially down to 2x2, to unit length, joined.

    Args:
        pools: tap name -> (B, C, H, W), those of `pools_of` in the order of the teacher's taps.

    Returns:
        (B, F) float32.
    """
    vectors = [
        functional.adaptive_avg_pool2d(tap.float(), _PLACES).flatten(1) for tap in pools.values()
    ]
    return torch.cat([functional.normalize(vector, dim=1) for vector in vectors], dim=1)


class Matcher(nn.Module):
    """How well images fit captions: cosines of both in the space where they were fitted to meet."""

    def __init__(self, features: int, dim: int) -> None:
        """Args:
        features: F, of the teacher.
        dim: D, of the text embedding.
        """
        super().__init__()
        self.config = {"features": features, "dim": dim}
        self.image, self.text = nn.Linear(features, dim), nn.Linear(dim, dim)

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        """(B, F) of images and (K, D) of captions -> (B, K) in [-1, 1]."""
        images = functional.normalize(self.image(features), dim=1)
        return images @ functional.normalize(self.text(text), dim=1).T


def matching_loss(scores: Tensor, own: Tensor) -> Tensor:
    """How much better other captions fit the images than their own.

    Formula: mean over i of -log softmax_k(s_ik / 0.1) at k = own_i
    Source: Xu et al. 2018, arXiv:1711.10485 (AttnGAN), the half of its DAMSM loss that reads the
        caption from the image, on whole captions.

    Args:
        scores: (B, K) from a `Matcher`, of K different captions.
        own: (B,) int64, which of them is an image's own.

    Returns:
        scalar float32, >= 0.
    """
    return functional.cross_entropy(scores / TEMPERATURE, own)


def save_matcher(matcher: Matcher, path: Path) -> None:
    """Write a matcher, with what is needed to build it again."""
    write_tensors(path, matcher.state_dict(), matcher.config)


def open_matcher(path: Path) -> Matcher:
    """The frozen matcher written by `save_matcher`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; the text names it.
    """
    state, config = read_tensors(path)
    try:
        matcher = Matcher(**config)
        matcher.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        raise damaged(path, error) from error
    return matcher.requires_grad_(requires_grad=False).eval()

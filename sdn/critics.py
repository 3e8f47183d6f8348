"""Critics: small networks that read the frozen teacher's taps and tell real from synthetic.

Departs from the paper: distances to one real image regress to a blur; a critic asks whether an
image could be one of those that the caption describes. The teacher stays the only source of vision.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from sdn.taps import check_taps, taps_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdn.student import Taps
    from sdn.taps import Blocks

_SIDE = 4
"""Height and width down to which a critic reduces its tap."""


class Critic(nn.Module):
    """Judges one tap: whether it is of a real image, and of one that the caption describes.

    The channels are mixed by a fixed random matrix first, so that no few of them decide; then 3x3
    convolutions of stride 2 down to about 4x4 places, each of which is judged.
    Source: Sauer et al. 2021, arXiv:2111.01007 (random mixing, spectral norm, a judgement a place);
    Miyato & Koyama 2018, arXiv:1802.05637 (the condition as an inner product).
    """

    def __init__(
        self,
        channels: int,
        side: int,
        *,
        scale: float,
        text_dim: int,
        width: int,
        generator: torch.Generator,
    ) -> None:
        """Args:
        channels, side: of the tap.
        scale: factor on the tap; spectral norm lets no critic amplify a faint one by itself.
        text_dim: D.
        width: channels of the critic.
        generator: of the mixing and of the initial weights.
        """
        super().__init__()
        self.mixing: Tensor
        mixing = torch.randn(channels, channels, generator=generator) * scale / math.sqrt(channels)
        self.register_buffer("mixing", mixing.view(channels, channels, 1, 1))
        convs = [_conv(channels, width, 1, generator)]
        while side > _SIDE:
            convs.append(_conv(width, width, 2, generator))
            side = (side + 1) // 2
        self.convs = nn.ModuleList(convs)
        self.judge = spectral_norm(_linear(width, 1, generator))
        self.text = spectral_norm(_linear(text_dim, width, generator))

    def forward(self, tap: Tensor, text: Tensor) -> Tensor:
        """Judgements, the higher the more real and the better the match.

        Args:
            tap: (B, C, H, W).
            text: (B, D).

        Returns:
            (B, P) float32, P places.
        """
        exactly = torch.autocast(tap.device.type, enabled=False)
        with exactly:  # spectral norms in float32; autocast is for the convolutions alone
            convs = [(cast("nn.Conv2d", conv), conv.weight) for conv in self.convs]
        x = functional.conv2d(tap, self.mixing)
        for conv, kernel in convs:
            x = functional.conv2d(x, cast("Tensor", kernel), conv.bias, conv.stride, conv.padding)
            x = functional.leaky_relu(x, 0.2)
        with exactly:
            places = x.float().flatten(2).transpose(1, 2)  # (B, P, width)
            match = (places * self.text(text).unsqueeze(1)).sum(2)
            found: Tensor = self.judge(places).squeeze(2) + match
        return found


class Critics(nn.Module):
    """One critic a level of the teacher."""

    def __init__(
        self,
        blocks: Blocks,
        taps: Mapping[str, float],
        *,
        tap_means: Mapping[str, float],
        resolution: int,
        text_dim: int,
        width: int,
        seed: int,
    ) -> None:
        """Args:
        blocks: the teacher's.
        taps: tap name -> weight of its critic; 0 leaves it out.
        tap_means: tap name -> mean absolute activation over training images, > 0.
        resolution: height and width of the image.
        text_dim: D.
        width: channels of each critic.
        seed: of the initial weights.

        Raises:
            ValueError: the teacher has no tap of such a name.
        """
        super().__init__()
        known = {tap.name: tap for tap in taps_of(blocks)}
        check_taps(blocks, taps, "critics")
        generator = torch.Generator().manual_seed(seed)
        self.weights = {name: taps[name] for name in known if taps.get(name, 0) > 0}
        self.critics = nn.ModuleDict()
        # The vectors that spectral norm begins with are drawn from the process's own generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in self.weights:
                self.critics[name] = Critic(
                    known[name].channels,
                    resolution // known[name].divisor,
                    scale=1 / max(tap_means[name], 1e-6),
                    text_dim=text_dim,
                    width=width,
                    generator=generator,
                )

    def forward(self, taps: Taps, text: Tensor) -> dict[str, Tensor]:
        """Tap name -> judgements (B, P)."""
        return {name: critic(taps[name], text) for name, critic in self.critics.items()}


def hinge(judged: Tensor, *, real: bool) -> Tensor:
    """A critic's loss on images that are real, or are not.

    Formula: mean max(0, 1 - D) where real, mean max(0, 1 + D) where not
    Source: Lim & Ye 2017, arXiv:1705.02894.

    Args:
        judged: any shape.
        real: what they should have been judged to be.

    Returns:
        scalar, >= 0.
    """
    return functional.relu(1 - judged if real else 1 + judged).mean()


def _conv(channels_in: int, channels: int, stride: int, generator: torch.Generator) -> nn.Module:
    conv = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1)
    _start(conv, generator)
    return spectral_norm(conv)


def _linear(size: int, out: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(size, out)
    _start(linear, generator)
    return linear


def _start(module: nn.Conv2d | nn.Linear, generator: torch.Generator) -> None:
    fan_in = module.weight[0].numel()
    nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_in), generator=generator)
    assert module.bias is not None
    nn.init.zeros_(module.bias)

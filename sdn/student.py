"""The student: from a text embedding to an image and its taps, the teacher's mirror image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdn.chroma import subsampled
from sdn.taps import HIDDEN, Blocks, student_layers

if TYPE_CHECKING:
    from collections.abc import Collection

Taps = dict[str, Tensor]
"""Tap name -> (B, C, H, W)."""


class Student(nn.Module):
    """The reflection of a VGG-shaped teacher.

    No noise, no normalisation, no dropout: one image per caption. Convolutions 3x3, stride 1,
    padding 1, bias; upsampling nearest neighbour x2; ReLU after everything but the upsamplings and
    the last convolution.
    Source: Yuan & Peng 2018, arXiv:1808.06801, and the layer sizes of the authors' release.

    Departs from the paper with `noise`, under which one caption has many images, with `leak`, under
    which no unit is dead, with `chroma` (see `sdn.chroma`), and with `condition` "levels": each
    convolution's sums are scaled and shifted by what the student reads, so that the text need not
    pass through 19 layers to matter at the last. Taps and their shapes stay those of the teacher.
    Source of the latter: Perez et al. 2018, arXiv:1709.07871; De Vries et al. 2017,
    arXiv:1707.00683.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        resolution: int,
        text_dim: int,
        width: float = 1.0,
        noise: int = 0,
        condition: Literal["top", "levels"] = "top",
        leak: float = 0.0,
        chroma: int = 1,
        init: Literal["release", "he", "identity"] = "release",
        seed: int = 0,
    ) -> None:
        """Args:
        blocks: the teacher's, or as those with fewer channels (`student.width` below 1).
        resolution: height and width of the image; divisible by 2 ** len(blocks).
        text_dim: D.
        width: factor on the hidden linear layers: the teacher's times the student's own.
        noise: random numbers beside the text embedding, Z.
        condition: where the text enters, see `sdn.config.StudentConfig`.
        leak: factor on what is below 0, in [0, 1); 0 is the ReLU.
        chroma: factor by which the image's chroma is subsampled, see `sdn.chroma`; divides the
            resolution.
        init: deviations of the initial weights, see `sdn.config.StudentConfig`.
        seed: of the initial weights.

        Raises:
            ValueError: the resolution does not halve often enough, or `chroma` does not divide it.
        """
        super().__init__()
        if resolution % 2 ** len(blocks):
            raise ValueError(
                f"resolution {resolution} cannot be halved {len(blocks)} times; "
                f"it must be divisible by {2 ** len(blocks)}"
            )
        if chroma < 1 or resolution % chroma:
            raise ValueError(f"chroma must divide resolution {resolution}, which {chroma} does not")
        hidden = max(1, round(HIDDEN * width))
        self.blocks = blocks
        self.layers = student_layers(blocks)
        self.top = (blocks[-1][0], resolution // 2 ** len(blocks))
        self.top_tap = f"pool{len(blocks)}"
        self.text_dim, self.noise, self.condition = text_dim, noise, condition
        self.leak, self.chroma = leak, chroma
        self.fc7 = nn.Linear(text_dim + noise, hidden)
        self.fc6 = nn.Linear(hidden, hidden)
        self.pool = nn.Linear(hidden, self.top[0] * self.top[1] ** 2)
        self.convs = nn.ModuleDict(
            {
                layer.tap: nn.Conv2d(layer.channels_in, layer.channels_out, 3, padding=1)
                for layer in self.layers
                if not layer.upsample
            }
        )
        self._initialise(init, torch.Generator().manual_seed(seed))
        self.levels: nn.ModuleDict | None = None
        if condition == "levels":
            self.levels = nn.ModuleDict()
            for layer in self.layers:
                if not layer.upsample and layer.tap != "image":
                    self.levels[layer.tap] = _unmoved(text_dim + noise, 2 * layer.channels_out)

    def _initialise(self, init: str, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                released = 0.1 if isinstance(module, nn.Linear) else 0.02
                # Departs from the paper with "he" and "identity": in narrow students the signal
                # dies out under the release's deviations.
                deviation = released if init == "release" else math.sqrt(2 / fan_in)
                nn.init.normal_(module.weight, 0, deviation, generator=generator)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
                if init == "identity" and isinstance(module, nn.Conv2d):
                    _towards_identity(module)

    def forward(self, code: Tensor, wanted: Collection[str] | None = None) -> Taps:
        """Taps of the synthesis, `image` among them.

        Args:
            code: (B, D + Z), the text embedding and the noise; see `sdn.noise.coded`.
            wanted: tap names; nothing below the lowest of them is computed. None for all.

        Returns:
            tap name -> (B, C, H, W), all that were computed; `image` is linear, nominally in
            [-1, 1] but not clamped.
        """
        left = None if wanted is None else set(wanted)
        x = self._rectified(self.fc7(code))  # (B, hidden)
        x = self._rectified(self.fc6(x))  # (B, hidden)
        channels, side = self.top
        x = self._rectified(self.pool(x)).view(-1, channels, side, side)
        x = x.contiguous(memory_format=torch.channels_last)
        taps = {self.top_tap: x}
        for layer in self.layers:
            if left is not None and left <= taps.keys():
                break
            if layer.upsample:
                x = functional.interpolate(x, scale_factor=2, mode="nearest")
            else:
                x = self.convs[layer.tap](x)
                # Departs from the paper, where text enters at the top alone: it fades on the way.
                if self.levels is not None and layer.tap in self.levels:
                    scale, shift = self.levels[layer.tap](code)[:, :, None, None].chunk(2, dim=1)
                    x = torch.addcmul(shift, x, 1 + scale)  # one pass, not two
                image = layer.tap == "image"
                x = subsampled(x, self.chroma) if image else self._rectified(x)
            taps[layer.tap] = x
        return taps

    def _rectified(self, sums: Tensor) -> Tensor:
        """In place: nothing else reads the sums."""
        if self.leak:
            # Departs from the paper: a unit can come back from below 0.
            return functional.leaky_relu(sums, self.leak, inplace=True)
        return functional.relu(sums, inplace=True)


def _unmoved(size: int, out: int) -> nn.Linear:
    """A linear layer whose outputs are 0, so that the student begins as the one without it."""
    linear = nn.Linear(size, out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def _towards_identity(conv: nn.Conv2d, share: float = 0.25) -> None:
    """Make a 3x3 convolution that keeps its channels near the identity; leave any other as it is.

    Departs from the paper: taps are >= 0, so the identity passes through the ReLU unchanged and the
    deep student begins as a shallow one.
    Source: the idea is that of DiracNets, Zagoruyko & Komodakis 2017, arXiv:1706.00388.

    Args:
        conv: with He's initial weights.
        share: of these in the result; the squares of both shares add up to 1.
    """
    if conv.in_channels == conv.out_channels:
        identity = nn.init.dirac_(torch.empty_like(conv.weight))
        conv.weight.mul_(share).add_(identity, alpha=math.sqrt(1 - share**2))

"""The mirror table: blocks of a VGG-shaped teacher <-> its taps <-> the student's layers.

Source: Yuan & Peng 2018, arXiv:1808.06801; the layer names are those of VGG.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Blocks = tuple[tuple[int, int], ...]
"""`(channels, convolutions)` of each block, from the image upwards."""

ARCHITECTURES: dict[str, Blocks] = {
    "vgg11": ((64, 1), (128, 1), (256, 2), (512, 2), (512, 2)),
    "vgg13": ((64, 2), (128, 2), (256, 2), (512, 2), (512, 2)),
    "vgg16": ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)),
    "vgg19": ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)),
}
"""Source: Simonyan & Zisserman 2015, arXiv:1409.1556, table 1 (A, B, D, E)."""

HIDDEN = 4096
"""Width of fc6 and fc7 at width factor 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """One mirrored activation."""

    name: str
    """`image`, `conv{block}_{convolution}` or `pool{block}`."""
    channels: int
    divisor: int
    """Resolution over the tap's height and width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentLayer:
    """One step of the student on its way from pool5 down to the image."""

    tap: str
    """Name of the tap that this step produces."""
    upsample: bool
    """True: nearest neighbour x2. False: a 3x3 convolution."""
    channels_in: int
    channels_out: int


def blocks_of(arch: str, width: float) -> Blocks:
    """The blocks of a named architecture with every number of channels times `width`."""
    return tuple((max(1, round(c * width)), n) for c, n in ARCHITECTURES[arch])


def taps_of(blocks: Blocks) -> tuple[Tap, ...]:
    """The taps of a teacher in the order in which it computes them, the image first."""
    taps = [Tap(name="image", channels=3, divisor=1)]
    for k, (channels, convolutions) in enumerate(blocks, start=1):
        taps += [
            Tap(name=f"conv{k}_{i}", channels=channels, divisor=2 ** (k - 1))
            for i in range(1, convolutions + 1)
        ]
        taps.append(Tap(name=f"pool{k}", channels=channels, divisor=2**k))
    return tuple(taps)


def check_taps(blocks: Blocks, wanted: Iterable[str], of: str) -> None:
    """Refuse names of taps that a teacher of these blocks lacks.

    Args:
        blocks: the teacher's.
        wanted: names.
        of: what they are wanted for, for the text.

    Raises:
        ValueError: one is not there; the text names it, and those there are.
    """
    known = [tap.name for tap in taps_of(blocks)]
    if unknown := sorted({*wanted} - {*known}):
        raise ValueError(
            f"{of}: the teacher has no tap {', '.join(unknown)}; there are: {', '.join(known)}"
        )


def student_layers(blocks: Blocks) -> tuple[StudentLayer, ...]:
    """The student's layers below pool5, by reflection of the teacher's, top first.

    `conv{k}_{last}` is the upsampled copy of `pool{k}`; the other convolutions of block k keep its
    channels; the convolution that ends block k produces `pool{k-1}`, or the image for k = 1.
    """
    layers = []
    for k in range(len(blocks), 0, -1):
        channels, convolutions = blocks[k - 1]
        below, channels_below = (f"pool{k - 1}", blocks[k - 2][0]) if k > 1 else ("image", 3)
        layers.append(
            StudentLayer(
                tap=f"conv{k}_{convolutions}",
                upsample=True,
                channels_in=channels,
                channels_out=channels,
            )
        )
        layers += [
            StudentLayer(
                tap=f"conv{k}_{i}", upsample=False, channels_in=channels, channels_out=channels
            )
            for i in range(convolutions - 1, 0, -1)
        ]
        layers.append(
            StudentLayer(
                tap=below, upsample=False, channels_in=channels, channels_out=channels_below
            )
        )
    return tuple(layers)

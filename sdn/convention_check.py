"""Whether pretrained weights are fed what they were trained on.

VGG is published for images in [0, 1] over their deviation and for 0..255 less the mean. Weights of
the latter that are fed the former still work, only that their biases drown what they see: nothing
fails, and the highest taps say nearly the same of all images. The other way round, weights for
[0, 1] that are fed 0..255, is not noticed: there the images drown the biases.
"""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from sdn.data.images import to_image
from sdn.teacher import Convention, Teacher

if TYPE_CHECKING:
    from torch import Tensor

_IMAGES, _BATCH = 32, 4
ALIKE = 0.9
"""Likeness from which on a teacher is asked whether another convention would suit it better: VGG16
of VGG's authors has 0.96 to 0.98 with `imagenet`, 0.28 to 0.45 with `mean-255`, on photos of
products, birds and drawings (DECISIONS.md, 2026-11-28)."""
CLEARLY = 0.2
"""By so much the likeness of another convention must be lower: weights that were drawn have 0.97 to
0.99 under `symmetric`, and hardly less under another."""


@torch.no_grad()
def likeness(teacher: Teacher, pixels: Tensor) -> float:
    """How alike different images are to a teacher: 1 where it tells none from another.

    Formula: mean over pairs i != j of cos(T(x_i), T(x_j)), T the deepest tap.

    Args:
        teacher: any.
        pixels: (N, 3, H, W) uint8, N > 1.

    Returns:
        In [0, 1] for taps after a ReLU, which are never below 0.
    """
    deepest = teacher.names[-1]
    # A few at a time: at 224 px the taps of one image take 60 MB.
    blocks = [teacher(to_image(some), (deepest,))[deepest] for some in torch.split(pixels, _BATCH)]
    seen = torch.cat(blocks).flatten(1)
    seen[~seen.any(1)] = 1  # images of which nothing is seen are alike
    unit = functional.normalize(seen, dim=1)
    pairs = len(unit) * (len(unit) - 1)
    return float(((unit @ unit.T).sum() - unit.square().sum()) / pairs)


def check_convention(teacher: Teacher, pixels: Tensor) -> None:
    """Refuse a convention under which a teacher hardly tells images apart that it otherwise does.

    Args:
        teacher: with pretrained weights.
        pixels: (N, 3, H, W) uint8 training images; a few are looked at.

    Raises:
        ValueError: another convention suits the weights; the text names it.
    """
    pixels = pixels[:_IMAGES]
    if len(pixels) < 2:
        return
    own = likeness(teacher, pixels)
    if own < ALIKE:
        return
    others = {}
    for convention in typing.get_args(Convention):
        other = Teacher(teacher.blocks, convention)
        other.load_state_dict(teacher.state_dict())
        others[convention] = likeness(other, pixels)
    better = sorted((alike, name) for name, alike in others.items() if alike < own - CLEARLY)
    if better:
        told = ", ".join(f"with {name} to {alike:.2f}" for alike, name in better)
        raise ValueError(
            f"teacher.weights were not trained on what teacher.convention={teacher.convention} "
            f"feeds them: to the teacher different training images are alike to {own:.2f} (mean "
            f"cosine at {teacher.names[-1]}), {told}; set teacher.convention to what they were "
            f"trained on (of these {better[0][1]} tells images apart best)"
        )

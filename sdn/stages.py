"""The two distillation stages of the paper: a batch becomes named losses.

Source: Yuan & Peng 2018, arXiv:1808.06801.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

from sdn.losses import tap_losses, wanted_taps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from sdn.config import LossWeights, StageConfig
    from sdn.student import Taps
    from sdn.teacher import FastTeacher, Teacher

StageName = Literal["stage_one", "stage_two", "stage_three"]


def stage_one_losses(
    student: Callable[..., Taps],
    teacher: Teacher | FastTeacher,
    text: Tensor,
    image: Tensor,
    *,
    weights: LossWeights,
    scales: Mapping[str, float],
    kind: Literal["l1", "l2"] = "l1",
) -> dict[str, Tensor]:
    """Layer to symmetrical layer: the student's own taps against the teacher's of the real image.

    Formula: loss[l] = w_l * d(T_l(x), S_l(t))

    Args:
        student: (text embedding, wanted taps) -> its taps; may be wrapped for distributed
            training, and narrower than the teacher (`as_wide_as`).
        teacher: frozen.
        text: (B, D).
        image: (B, 3, H, W), RGB, in [-1, 1].
        weights: dimensionless; taps of weight 0 are not computed.
        scales: see `scales_of`.
        kind: of distance, see `tap_losses`.

    Returns:
        tap name -> scalar float32.
    """
    wanted = wanted_taps(teacher.names, weights)
    with torch.no_grad():
        real = teacher(image, wanted)
    made = student(text, wanted)
    return tap_losses(made, as_wide_as(made, real), weights, scales, kind)


def as_wide_as(student: Taps, teacher: Taps) -> Taps:
    """The teacher's taps with as many channels as the student's: means of groups of neighbours.

    Departs from the paper where `student.width` is below 1; else the taps are returned as they are.
    Means rather than a learned map of channels: no tap becomes negative, and where the numbers of
    channels divide, the mean activation stays, by which `scales_of` divides.

    Args:
        student: tap name -> (B, C_l, H_l, W_l).
        teacher: tap name -> (B, D_l, H_l, W_l).

    Returns:
        tap name -> (B, min(C_l, D_l), H_l, W_l); those that the student lacks as they are.
    """
    found = {}
    for name, tap in teacher.items():
        channels = student[name].shape[1] if name in student else tap.shape[1]
        found[name] = tap
        if channels < tap.shape[1]:
            size = (channels, *tap.shape[2:])
            found[name] = functional.adaptive_avg_pool3d(tap.unsqueeze(1), size).squeeze(1)
    return found


def stage_two_losses(
    student: Callable[..., Taps],
    teacher: Teacher | FastTeacher,
    text: Tensor,
    image: Tensor,
    *,
    weights: LossWeights,
    scales: Mapping[str, float],
    kind: Literal["l1", "l2"] = "l1",
) -> dict[str, Tensor]:
    """The teacher reads the synthesis: its taps of the synthesis against those of the real image.

    Formula: loss[l] = w_l * d(T_l(x), T_l(S(t)))

    Arguments and result as in `stage_one_losses`; the student's inner taps play no part.
    """
    wanted = wanted_taps(teacher.names, weights)
    with torch.no_grad():
        real = teacher(image, wanted)
    made = student(text, ("image",))["image"]
    return tap_losses(teacher(made, wanted), real, weights, scales, kind)


STAGES = {"stage_one": stage_one_losses, "stage_two": stage_two_losses}


def scales_of(config: StageConfig, tap_means: Mapping[str, float]) -> dict[str, float]:
    """The factor of each tap's distance: 1 (raw) or one over the teacher's mean activation there.

    Departs from the paper where `scale` is "relative": raw activations differ from tap to tap by
    orders of magnitude, so that equal weights do not mean equal influence.

    Args:
        config: of the stage.
        tap_means: tap name -> mean absolute activation over training images, > 0.
    """
    scales = dict.fromkeys(tap_means, 1.0)
    if config.scale == "relative":
        scales = {name: 1.0 / max(mean, 1e-6) for name, mean in tap_means.items()}
    scales["image"] *= config.image_scale
    return scales

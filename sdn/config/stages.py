"""The stages of training: their loss weights and how they move."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from sdn.config.required import require

Precision = Literal["float32", "bf16", "fp16", "auto"]

TAP_GROUPS = ("image", "conv1", "conv2", "conv3", "conv4", "conv5")
"""Groups of taps that share a weight; `pool{k}` belongs to the group `conv{k}`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """Weights of the distillation terms; dimensionless, >= 0. A term of 0 is not computed."""

    image: float = 1.0
    """Weight of `loss/image`, the pixel term."""
    conv1: float = 1.0
    """Weight of each tap of `conv1_*` and `pool1`."""
    conv2: float = 1.0
    """Weight of each tap of `conv2_*` and `pool2`."""
    conv3: float = 1.0
    """Weight of each tap of `conv3_*` and `pool3`."""
    conv4: float = 1.0
    """Weight of each tap of `conv4_*` and `pool4`."""
    conv5: float = 1.0
    """Weight of each tap of `conv5_*` and `pool5`."""
    taps: dict[str, float] = field(default_factory=dict)
    """Tap name -> weight, in place of its group's."""

    def __post_init__(self) -> None:
        for name in self.taps:
            require(
                re.fullmatch(r"image|conv[1-5]_[1-4]|pool[1-5]", name) is not None,
                f"taps.{name}: no tap has this name; image, conv1_1, .., pool5 are taps",
            )
        values = {name: getattr(self, name) for name in TAP_GROUPS} | self.taps
        for name, value in values.items():
            key = f"taps.{name}" if name in self.taps else name
            require(0 <= value < math.inf, f"{key} must be >= 0 and finite, not {value}")
        require(
            any(value > 0 for value in values.values()),
            "image, conv1 .. conv5 or one of taps must be > 0, not all 0: there is no loss then",
        )

    def of(self, tap: str) -> float:
        """Weight of the tap of this name: its own, or that of its group."""
        group = tap if tap == "image" else f"conv{tap.removeprefix('conv').removeprefix('pool')[0]}"
        return float(self.taps.get(tap, getattr(self, group)))


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One distillation stage of the student."""

    epochs: float = 1.0
    """Length in passes over the training split; 0 skips the stage."""
    # Departs from the paper's release, which has 12 (recipe `release_cub`): feeds several ranks.
    global_batch: int = 32
    """Images a step over all workers together."""
    rate: float = 1e-4
    """Learning rate (its peak, where the schedule is not constant)."""
    schedule: Literal["constant", "warm-up", "one-cycle"] = "constant"
    """constant as in the release; warm-up: linear warm-up, then constant; one-cycle: linear
    warm-up, then cosine to a hundredth."""
    # Departs from the paper where it is lower: short trainings change faster than 0.999 follows.
    beta2: float = 0.999
    """Decay of Adam's second moment, 0..1; 0.999 as published, lower follows a changing gradient
    sooner."""
    warmup_share: float = 0.05
    """Share of the steps that warm up in the schedules that do."""
    clip: float | None = None
    """Largest Euclidean norm of the gradient; a longer one is scaled down to it. None, as in the
    paper: no limit."""
    accumulate: int = 1
    """Parts into which each rank cuts its share of a batch, one after another, to save memory."""
    average_share: float = 0.0
    """Horizon of the weights' moving average as a share of the stage's steps; 0 keeps none."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Loss weights; in stage two, what the search starts from and falls back to."""
    scale: Literal["raw", "relative"] = "raw"
    """raw: distances as published. relative: each tap's distance over the teacher's mean
    activation at that tap, so that equal weights mean equal influence."""
    distance: Literal["l1", "l2"] = "l1"
    """l1 as published, or the mean squared difference in its place, to be compared with it."""
    image_scale: float = 1.0
    """Factor on the pixel term; 127.5 puts it on the 0..255 scale of the release."""
    # Departs from the paper, whose release computes in float32: bf16 is several times as fast.
    precision: Precision = "auto"
    """auto: bf16 where the device computes in it natively, else float32. fp16 scales its losses,
    and leaves out a step whose gradient overflows."""
    # Departs from the paper, which has one rank, where it is not "none": half as much to send.
    compress: Literal["none", "bf16"] = "none"
    """What gradients are rounded to on their way between ranks."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of student and teacher; auto: where it was measured to pay."""
    checkpoint_images: int = 10_000
    """Images between two checkpoints: what a failure can cost at most."""
    keep: int = 2
    """Newest checkpoints kept, beside the one of the lowest loss."""
    seed: int = 0
    """Order of the samples and initial weights."""

    def __post_init__(self) -> None:
        require(0 <= self.epochs < 1e6, f"epochs must be in [0, 1e6), not {self.epochs}")
        require(self.seed >= 0, f"seed must be >= 0, not {self.seed}")
        require(self.global_batch > 0, f"global_batch must be > 0, not {self.global_batch}")
        require(0 < self.rate < 1, f"rate must be in (0, 1), not {self.rate}")
        for name in ("beta2", "warmup_share", "average_share"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must be in [0, 1), not {value}")
        for name in ("checkpoint_images", "accumulate", "keep"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be > 0, not {value}")
        require(self.clip is None or self.clip > 0, f"clip must be > 0 or null, not {self.clip}")
        require(self.image_scale > 0, f"image_scale must be > 0, not {self.image_scale}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversarialConfig(StageConfig):
    """Stage three, which the paper does not have: critics on the teacher's taps (`sdn.critics`).

    Its settings that other stages have, too, stand as they were found to work: RESULTS.md. `clip`
    limits the student's gradient, not the critics'.
    """

    # Departs from the paper where epochs > 0: distances to one image blur, and use no noise.
    epochs: float = 0.0
    """Length in passes over the training split; 0, as in the paper, leaves the stage out."""
    global_batch: int = 16
    rate: float = 7e-4
    """At 1e-3 `fashion64` diverged in a stage of four passes (DECISIONS.md, 2026-11-28)."""
    schedule: Literal["constant", "warm-up", "one-cycle"] = "one-cycle"
    beta2: float = 0.99
    average_share: float = 0.05
    scale: Literal["raw", "relative"] = "relative"
    weights: LossWeights = field(
        default_factory=lambda: LossWeights(
            image=2, conv1=0.1, conv2=0.1, conv3=0.3, conv4=1, conv5=1
        )
    )
    """Small beside what the critics say, for a distance to one image blurs and moves no noise: all
    but those of the highest taps, and of the image, which keeps the tone."""
    critics: dict[str, float] = field(
        default_factory=lambda: {"pool2": 1.0, "pool3": 1.0, "pool4": 1.0, "pool5": 1.0}
    )
    """Tap name -> weight of the critic that reads it, in shares of their sum."""
    critic_width: int = 64
    """Channels of each critic."""
    critic_rate: float = 7e-4
    """Learning rate of the critics at the peak of the student's."""
    adversary: float = 6.0
    """Weight of what the critics say, beside the distances (`weights`)."""
    diversity: float = 0.0
    """Weight of the term that keeps two images of one caption apart; costs a second synthesis."""
    augment: Literal["none", "differentiable"] = "none"
    """Whether critics, and with them the distances, see images with other colours, moved, and with
    a hole, so that few images do not become known by heart."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        require(
            not self.critics.get("image"),
            "critics.image is not possible: critics see with the teacher's eyes alone; "
            "take conv1_1 or a later tap",
        )
        for name, value in self.critics.items():
            require(
                0 <= value < math.inf,
                f"critics.{name} must be >= 0 and finite, not {value}",
            )
        require(
            any(value > 0 for value in self.critics.values()),
            f"critics must have one that is > 0, not {self.critics}",
        )
        require(self.critic_width > 0, f"critic_width must be > 0, not {self.critic_width}")
        require(
            0 < self.critic_rate < 1,
            f"critic_rate must be in (0, 1), not {self.critic_rate}",
        )
        for name in ("adversary", "diversity"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be >= 0 and finite, not {value}")
        require(
            self.precision != "fp16",
            "precision must be bf16, float32 or auto, not fp16: two losses cannot share one scale",
        )
        require(self.accumulate == 1, f"accumulate must be 1, not {self.accumulate}")
        require(
            self.compile != "on",
            "compile must be auto or off, not on: stage three is never compiled",
        )
        require(
            self.global_batch >= 2,
            f"global_batch must be >= 2, not {self.global_batch}: a critic is shown "
            "the caption of another image, too",
        )

"""What a model is scored by, and when it becomes champion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sdn.config.required import require


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    """The joint embedding of captions and images that only evaluation reads (`sdn.judge`)."""

    dim: int = 256
    """Numbers in the joint embedding, E."""
    epochs: int = 20
    """Passes over the training images; the epoch that validation images like best is kept."""
    batch: int = 128
    """Images a step; each is its own class."""
    rate: float = 1e-3
    """Learning rate (AdamW)."""
    decay: float = 0.1
    """Weight decay of the linear layers."""
    noise: float = 0.3
    """Deviation of the noise on the features in training, in deviations of each feature."""
    temperature: float = 0.07
    """Of the softmax over the batch."""
    seed: int = 0
    """Initial weights, order and noise."""

    def __post_init__(self) -> None:
        for name in ("dim", "epochs"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be > 0, not {value}")
        require(self.batch > 1, f"batch must be > 1 (negatives), not {self.batch}")
        for name in ("rate", "temperature"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be > 0, not {value}")
        for name in ("decay", "noise"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must be >= 0, not {value}")


INCEPTION_WEIGHTS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
"""The standard FID Inception's weights, as pytorch-fid publishes them."""
INCEPTION_DIGEST = "6726825d"
"""Beginning of their SHA-256, as it stands in the file's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What is scored and shown."""

    protocol: Literal["each-image", "authors", "gan"] = "each-image"
    """Which captions are drawn. each-image: the first caption of each test image. authors: every
    caption of the test split once, Inception Score in 10 splits, as in the authors' release. gan:
    30,000 of all test captions, as in the GAN papers, or all where there are fewer. The figures of
    different protocols say nothing about each other."""
    captions: int | None = None
    """At most this many images are drawn; None takes what the protocol says."""
    seed: int = 0
    """Of draws, mismatched captions, pairs and (where a model has noise) images."""
    splits: int = 10
    """Over which the mean and deviation of Inception Score are taken."""
    features: Literal["lite0", "inception", "teacher"] = "lite0"
    """Network in whose features sets are compared. lite0: EfficientNet-Lite0, ImageNet; inception:
    the standard FID Inception; teacher: the run's own, which favours what it taught."""
    features_size: int = 224
    """Height and width in pixels at which lite0 sees images; a smaller one is faster."""
    inception: str = INCEPTION_WEIGHTS
    """File or URL of Inception's weights."""
    inception_sha256: str = INCEPTION_DIGEST
    """Their digest or its beginning, at least 8 digits."""
    real_images: int = 10_000
    """At most so many images of a split are taken into the reference; they are a random draw."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The joint embedding that caption match is judged by."""
    sheet: int = 32
    """Rows of the contact sheet."""
    samples: int = 8
    """Images that are kept as files; a registered model must draw the same ones bit for bit."""

    def __post_init__(self) -> None:
        for name in ("sheet", "samples", "real_images"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be > 0, not {value}")
        require(self.splits > 1, f"splits must be > 1 (deviation), not {self.splits}")
        require(self.seed >= 0, f"seed must be >= 0, not {self.seed}")
        require(
            self.captions is None or self.captions > 2,
            f"captions must be > 2, not {self.captions}",
        )
        require(
            self.features_size >= 32 and self.features_size % 32 == 0,
            f"features_size must be a multiple of 32, not {self.features_size}",
        )
        require(
            len(self.inception_sha256) >= 8,
            "inception_sha256 must have at least 8 hexadecimal digits, not "
            f"{self.inception_sha256}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotionConfig:
    """When a new version takes the place of the champion."""

    level: float = 0.025
    """Chance of promoting a version that is only as good as the champion, 0..1."""
    margin: float = 0.1
    """By how much caption match may be worse at most, 0..1; it must be shown at the same level that
    it is not worse by more."""

    def __post_init__(self) -> None:
        require(0 < self.level < 0.5, f"level must be in (0, 0.5), not {self.level}")
        require(0 < self.margin <= 1, f"margin must be in (0, 1], not {self.margin}")

"""Teacher, caption encoder and student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdn.config.required import require

MOST_NOISE = 3.0
"""Largest factor on a student's noise: far outside what it was trained with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The frozen classifier: its shape, its input convention, and where its weights come from."""

    arch: Literal["vgg11", "vgg13", "vgg16", "vgg19"] = "vgg19"
    """Blocks of convolutions, as in Simonyan & Zisserman 2015."""
    width: float = 1.0
    """Factor on every number of channels; 1 is the published network."""
    convention: Literal["imagenet", "mean-255", "release", "symmetric"] = "imagenet"
    """What the first convolution receives. imagenet: RGB over [0, 1], minus mean, over deviation.
    mean-255: RGB, 0..255, minus the mean that VGG's authors subtracted. release: BGR, 0..255, no
    mean subtraction, as in the authors' release. symmetric: the image in [-1, 1] as it is (for
    teachers fitted here)."""
    weights: str | None = None
    """File or URL in torchvision's layout (.pth or .safetensors); None fits the teacher on the
    training split's own labels."""
    sha256: str | None = None
    """Expected digest of the weight file or its beginning, at least 8 digits; needed for a URL."""
    epochs: int = 8
    """Passes over the training split when the teacher is fitted. 0 fits nothing: the teacher has
    seen no image, its weights are drawn, to be compared with one that has."""
    batch: int = 64
    """Images a step when the teacher is fitted."""
    rate: float = 2e-3
    """Peak learning rate of the fit (one cycle, AdamW)."""
    checkpoint_images: int = 20_000
    """Images between two checkpoints of the fit."""
    seed: int = 0
    """Initial weights and order of the fit."""

    def __post_init__(self) -> None:
        require(0 < self.width <= 4, f"width must be in (0, 4], not {self.width}")
        require(self.epochs >= 0, f"epochs must be >= 0, not {self.epochs}")
        require(self.batch > 1, f"batch must be > 1 (batch norm), not {self.batch}")
        require(self.rate > 0, f"rate must be > 0, not {self.rate}")
        require(
            self.checkpoint_images > 0,
            f"checkpoint_images must be > 0, not {self.checkpoint_images}",
        )
        require(
            self.weights is None or self.epochs > 0,
            f"epochs=0 is for a teacher that has seen no image, but its weights are those "
            f"of {self.weights}: set teacher.weights=null and teacher.sha256=null, or other epochs",
        )
        require(
            self.sha256 is None or len(self.sha256) >= 8,
            f"sha256 must have at least 8 hexadecimal digits, not {self.sha256}",
        )
        require(
            self.weights is None or "://" not in self.weights or self.sha256 is not None,
            f"sha256 is needed when teacher.weights is a URL ({self.weights})",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """The caption encoder, trained before the student and frozen afterwards."""

    encoder: Literal["char-cnn-rnn", "sentence"] = "char-cnn-rnn"
    """char-CNN-RNN of Reed et al. 2016, or the MiniLM sentence encoder (extra `sentence`)."""
    dim: int = 1024
    """Numbers in a text embedding, D. The sentence encoder projects its 384 to D."""
    width: int = 256
    """Channels of the character convolutions."""
    max_chars: int = 201
    """Characters read of a caption; longer ones are cut in training and refused in generation."""
    loss: Literal["joint-embedding", "contrastive"] = "joint-embedding"
    """Reed's structured joint embedding hinge, or the softmax over the batch in its place."""
    # Departs from the paper where one of the next three is set: captions of which many differ in
    # one word, and few of those are there to learn from.
    loudest: bool = False
    """Whether the char-CNN-RNN's last layer reads the maximum over time, too (`sdn.captions`)."""
    siblings: int = 1
    """Captions next to each other in the alphabet that share a batch of the fit."""
    even: bool = False
    """Whether embeddings are evened out over the training captions (`sdn.captions.evening`)."""
    epochs: int = 40
    """Passes over the training split."""
    batch: int = 64
    """Captions a step; each is its own class."""
    rate: float = 2e-3
    """Peak learning rate (one cycle, AdamW)."""
    checkpoint_images: int = 50_000
    """Captions between two checkpoints of the fit."""
    seed: int = 0
    """Initial weights and order."""

    def __post_init__(self) -> None:
        for name in ("dim", "width", "max_chars", "epochs", "checkpoint_images", "siblings"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be > 0, not {value}")
        require(self.batch > 1, f"batch must be > 1 (negatives), not {self.batch}")
        require(self.rate > 0, f"rate must be > 0, not {self.rate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """The generator: where it begins, and in what it is not its teacher's exact reflection."""

    # Departs from the paper where a value is not the default: each was measured, see RESULTS.md
    # and, of `init`, DECISIONS.md.
    width: float = 1.0
    """Factor on the teacher's numbers of channels, in (0, 1]; 1, as in the paper, mirrors them.
    A narrower student is smaller and faster than its teacher; stage one compares each of its
    channels with the mean of a group of the teacher's."""
    init: Literal["release", "he", "identity"] = "release"
    """release: conv N(0, 0.02), linear N(0, 0.1). he: N(0, sqrt(2 / fan_in)), for narrow students,
    whose signal the release's deviations let die out on the way up. identity: as he, but a
    convolution that keeps its channels begins near the identity, which trains far faster."""
    noise: int = 0
    """Random numbers beside the text embedding, so that one caption can have many images; 0 as in
    the paper. Of use with a stage three alone: a distance to one image teaches to ignore it."""
    noise_scale: float = 1.0
    """Factor on the noise of the images that a finished model draws, 0..3; training has 1. Below,
    images of a caption are more alike, above they differ more. No weight depends on it."""
    condition: Literal["top", "levels"] = "top"
    """Where the text enters. top: where the student begins, as in the paper. levels: at each
    convolution too, as a scale and a shift of its sums."""
    leak: float = 0.0
    """Factor on what is below 0, in [0, 1); 0, as in the paper, is the ReLU. With a leak a unit
    that is below 0 for every caption, as stage one leaves many, can still learn."""
    chroma: int = 1
    """Factor by which the image's chroma is coarser than its brightness (`sdn.chroma`); 1 as in the
    paper, 2 is that of most JPEG files. Photos have little fine chroma; a student's is noise."""

    def __post_init__(self) -> None:
        require(0 < self.width <= 1, f"width must be in (0, 1], not {self.width}")
        require(0 <= self.leak < 1, f"leak must be in [0, 1), not {self.leak}")
        require(self.chroma in (1, 2, 4, 8), f"chroma must be 1, 2, 4 or 8, not {self.chroma}")
        require(self.noise >= 0, f"noise must be >= 0, not {self.noise}")
        require(
            0 <= self.noise_scale <= MOST_NOISE,
            f"noise_scale must be in [0, {MOST_NOISE:g}], not {self.noise_scale}",
        )

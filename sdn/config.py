"""The whole configuration of a run: frozen dataclasses, one per stage, checked when they are made.

`sdn.recipes` holds named runs, `with_overrides` changes single values, `to_dict` and `from_dict`
carry a config through JSON (checkpoints, manifests, stage keys).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Fit = Literal["pad", "resize", "crop", "box"]
Precision = Literal["float32", "bf16", "fp16", "auto"]
T = TypeVar("T")

TAP_GROUPS = ("image", "conv1", "conv2", "conv3", "conv4", "conv5")
"""Groups of taps that share a weight; `pool{k}` belongs to the group `conv{k}`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What the data set is and how its images are prepared."""

    source: str = "openmoji"
    """Name of a reader in `sdn.data.sources`."""
    path: str | None = None
    """Where the source lies: a folder, for some sources also s3://bucket/prefix; None for a source
    that carries its own data."""
    image_field: str | None = None
    """Column or field with the image in tables (parquet, captions.csv); None takes the usual
    names."""
    caption_field: str | None = None
    """Column or field with the caption in tables and JSON; None takes the usual names."""
    resolution: int = 64
    """Height and width of the prepared images in pixels; divisible by 32."""
    fit: Fit = "pad"
    """How an image becomes square: white borders (pad), stretching (resize), cutting its centre out
    (crop), or cutting out a square about the object's box (box; sources with boxes only)."""
    image_format: Literal["png", "jpg"] = "png"
    """Encoding inside the shards; jpg is 4:4:4 at quality 95."""
    shard_samples: int = 256
    """Samples a shard."""
    validation_share: float = 0.05
    """Share of the compositions (or images) kept for ranking trials, 0..1."""
    test_share: float = 0.1
    """Share of the compositions (or images) kept for the final scores, 0..1."""
    limit: int | None = None
    """At most this many records, for trying things out."""
    duplicates: Literal["report", "hold-out", "drop"] = "report"
    """What becomes of an image that comes more than once. report: it stays, and is counted.
    hold-out: a training (or validation) image that is also in the test split is left out of the
    former, and a training image that is also in validation. drop: as hold-out, and of several in
    one split only the first stays."""
    same: Literal["pixels", "near", "words"] = "pixels"
    """When `duplicates` takes two for one. pixels: the prepared images are equal. near: also when
    they look alike, coarsely. words: also when their captions have the same words."""
    max_pixels: int = 64_000_000
    """Largest image accepted, in pixels; more is taken for a decompression bomb."""
    failure_budget: float = 0.01
    """Share of records that may become dead letters before preparation fails, 0..1."""

    def __post_init__(self) -> None:
        _require(
            self.resolution >= 32 and self.resolution % 32 == 0,
            f"data.resolution must be a positive multiple of 32 (five halvings by the teacher's "
            f"pools), not {self.resolution}; try {max(32, round(self.resolution / 32) * 32)}",
        )
        _require(
            self.shard_samples > 0, f"data.shard_samples must be > 0, not {self.shard_samples}"
        )
        for name in ("validation_share", "test_share", "failure_budget"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"data.{name} must be in [0, 1), not {value}")
        _require(
            self.validation_share + self.test_share < 1,
            "data.validation_share + data.test_share must leave something to train on (< 1), not "
            f"{self.validation_share + self.test_share}",
        )
        _require(self.limit is None or self.limit > 0, f"data.limit must be > 0, not {self.limit}")
        _require(self.max_pixels > 0, f"data.max_pixels must be > 0, not {self.max_pixels}")


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
        _require(0 < self.width <= 4, f"teacher.width must be in (0, 4], not {self.width}")
        _require(self.epochs >= 0, f"teacher.epochs must be >= 0, not {self.epochs}")
        _require(self.batch > 1, f"teacher.batch must be > 1 (batch norm), not {self.batch}")
        _require(self.rate > 0, f"teacher.rate must be > 0, not {self.rate}")
        _require(self.checkpoint_images > 0, "teacher.checkpoint_images must be > 0")
        _require(
            self.weights is None or self.epochs > 0,
            f"teacher.epochs=0 is for a teacher that has seen no image, but its weights are those "
            f"of {self.weights}: set teacher.weights=null and teacher.sha256=null, or other epochs",
        )
        _require(
            self.sha256 is None or len(self.sha256) >= 8,
            f"teacher.sha256 must have at least 8 hexadecimal digits, not {self.sha256}",
        )
        _require(
            self.weights is None or "://" not in self.weights or self.sha256 is not None,
            f"teacher.sha256 is needed when teacher.weights is a URL ({self.weights})",
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
    # Departs from the paper where one of the next three is set: RESULTS.md's recipes are fitted on
    # few captions, which often differ in one word.
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
            _require(getattr(self, name) > 0, f"captions.{name} must be > 0")
        _require(self.batch > 1, f"captions.batch must be > 1 (negatives), not {self.batch}")
        _require(self.rate > 0, f"captions.rate must be > 0, not {self.rate}")


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
            _require(
                re.fullmatch(r"image|conv[1-5]_[1-4]|pool[1-5]", name) is not None,
                f"weights.taps.{name}: no tap has this name; image, conv1_1, .., pool5 are taps",
            )
        values = {name: getattr(self, name) for name in TAP_GROUPS} | self.taps
        for name, value in values.items():
            _require(0 <= value < math.inf, f"weights.{name} must be >= 0 and finite, not {value}")
        _require(
            any(value > 0 for value in values.values()), "at least one loss weight must be > 0"
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
    global_batch: int = 32
    """Images a step over all workers together."""
    rate: float = 1e-4
    """Learning rate (its peak, where the schedule is not constant)."""
    schedule: Literal["constant", "warm-up", "one-cycle"] = "constant"
    """constant as in the release; warm-up: linear warm-up, then constant; one-cycle: linear
    warm-up, then cosine to a hundredth."""
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
    precision: Precision = "auto"
    """auto: bf16 where the device computes in it natively, else float32. fp16 scales its losses,
    and leaves out a step whose gradient overflows."""
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
        _require(0 <= self.epochs < 1e6, f"epochs must be in [0, 1e6), not {self.epochs}")
        _require(self.seed >= 0, f"seed must be >= 0, not {self.seed}")
        _require(self.global_batch > 0, f"global_batch must be > 0, not {self.global_batch}")
        _require(0 < self.rate < 1, f"rate must be in (0, 1), not {self.rate}")
        for name in ("beta2", "warmup_share", "average_share"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1)")
        for name in ("checkpoint_images", "accumulate", "keep"):
            _require(getattr(self, name) > 0, f"{name} must be > 0, not {getattr(self, name)}")
        _require(self.clip is None or self.clip > 0, f"clip must be > 0 or null, not {self.clip}")
        _require(self.image_scale > 0, "image_scale must be > 0")


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
    rate: float = 1e-3
    schedule: Literal["constant", "warm-up", "one-cycle"] = "one-cycle"
    beta2: float = 0.99
    average_share: float = 0.05
    scale: Literal["raw", "relative"] = "relative"
    weights: LossWeights = field(
        default_factory=lambda: LossWeights(image=2, conv1=0.1, conv2=0.1, conv3=0.3)
    )
    """Small beside what the critics say: a distance to one image blurs, and moves no noise."""
    critics: dict[str, float] = field(
        default_factory=lambda: {"pool2": 1.0, "pool3": 1.0, "pool4": 1.0, "pool5": 1.0}
    )
    """Tap name -> weight of the critic that reads it, in shares of their sum."""
    critic_width: int = 64
    """Channels of each critic."""
    critic_rate: float = 1e-3
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
        _require(
            not self.critics.get("image"),
            "stage_three.critics.image is not possible: critics see with the teacher's eyes alone; "
            "take conv1_1 or a later tap",
        )
        for name, value in self.critics.items():
            _require(
                0 <= value < math.inf,
                f"stage_three.critics.{name} must be >= 0 and finite, not {value}",
            )
        _require(
            any(value > 0 for value in self.critics.values()),
            "stage_three.critics: at least one must be > 0",
        )
        _require(self.critic_width > 0, "stage_three.critic_width must be > 0")
        _require(0 < self.critic_rate < 1, "stage_three.critic_rate must be in (0, 1)")
        for name in ("adversary", "diversity"):
            value = getattr(self, name)
            _require(
                0 <= value < math.inf, f"stage_three.{name} must be >= 0 and finite, not {value}"
            )
        _require(
            self.precision != "fp16",
            "stage_three.precision=fp16 is not possible: two losses cannot share one scale; take "
            "bf16, float32 or auto",
        )
        _require(self.accumulate == 1, "stage_three.accumulate must be 1")
        _require(
            self.compile != "on", "stage_three.compile must be auto or off: it is never compiled"
        )
        _require(
            self.global_batch >= 2,
            f"stage_three.global_batch must be >= 2, not {self.global_batch}: a critic is shown "
            "the caption of another image, too",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """The generator: where it begins, and in what it is not its teacher's exact reflection."""

    # Departs from the paper where a value is not the default: each was measured, see RESULTS.md.
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
    condition: Literal["top", "levels"] = "top"
    """Where the text enters. top: where the student begins, as in the paper. levels: at each
    convolution too, as a scale and a shift of its sums."""
    leak: float = 0.0
    """Factor on what is below 0, in [0, 1); 0, as in the paper, is the ReLU. With a leak a unit
    that is below 0 for every caption, as stage one leaves many, can still learn."""

    def __post_init__(self) -> None:
        _require(0 < self.width <= 1, f"student.width must be in (0, 1], not {self.width}")
        _require(0 <= self.leak < 1, f"student.leak must be in [0, 1), not {self.leak}")
        _require(self.noise >= 0, f"student.noise must be >= 0, not {self.noise}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Where a search looks for a value: log-uniform between two factors on the recipe's own."""

    low: float = 0.1
    """Smallest factor; at most 1, so that the recipe's own value is among the others."""
    high: float = 10.0
    """Largest factor; at least 1."""

    def __post_init__(self) -> None:
        _require(
            0 < self.low <= 1 <= self.high < float("inf"),
            "the factors on the recipe's own value must satisfy 0 < low <= 1 <= high, not low "
            f"{self.low}, high {self.high}",
        )


_VARIED = re.compile(r"(stage_one\.)?(image|conv[1-5](_[1-4])?|pool[1-5]|rate)|share")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """The search over loss weights, the rate and, on request, stage one."""

    trials: int = 4
    """Trials in all; the first is always the recipe's own weights. 0 or 1 searches nothing."""
    images: int = 8_000
    """Length of a whole trial in images seen."""
    space: dict[str, Range] = field(
        default_factory=lambda: {group: Range() for group in TAP_GROUPS}
    )
    """What is searched: a group of taps (image, conv1, .., conv5), a single tap (conv3_1), rate,
    and, with `stage_one`, the same of stage one (stage_one.conv3) and share, stage one's share of
    all images. Each by a factor on the recipe's own value; a weight of 0 stays 0. With `stage_one`
    and no name that is about stage one, all its groups and share are added."""
    stage_one: bool = False
    """Whether each trial trains stage one too, instead of starting from the one that is shared."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """asha: trials that are behind at a rung are stopped. pbt: population based training, in which
    those behind go on from a copy of those ahead with changed values. none: all run to the end."""
    first_images: int | None = None
    """Images seen at the first rung, and between two changes of a population; None takes a ninth
    of `images` for asha and a quarter for pbt."""
    reduction: float = 3.0
    """One in so many trials goes on beyond a rung; each rung is so many times as long."""
    random_trials: int = 8
    """Trials drawn at random before the sampler (TPE) learns from those that ended."""
    score: Literal["kid", "retrieval"] = "kid"
    """kid: KID of the images of validation captions; retrieval: mean reciprocal rank of the true
    image among all validation and training images, compared in pixels."""
    captions: int = 256
    """Validation captions on which a trial is ranked."""
    reruns: int = 2
    """At most so many of the best trials are trained again at full length, beside the recipe's own
    values; only there can they replace these. 0 keeps the recipe's own in any case."""
    rerun_level: float = 0.025
    """Only trials whose gain over the recipe's own values has at most this p-value in short form
    are worth full length, 0..1; 1 takes the best ones whatever they gain."""
    level: float = 0.025
    """Chance of replacing the recipe's own values by others that are only as good, 0..1, as if the
    captions had not chosen the trials before."""
    minutes: float | None = None
    """Time for the trials (not for full length); when it is over the running ones are stopped."""
    workers: int = 1
    """Ranks of a trial, each with one thread; more than one is a Ray Train run of its own."""
    seed: int = 0
    """Seed of the sampler."""

    def __post_init__(self) -> None:
        for name in ("trials", "reruns", "random_trials", "seed"):
            _require(
                getattr(self, name) >= 0, f"search.{name} must be >= 0, not {getattr(self, name)}"
            )
        _require(self.images > 0, f"search.images must be > 0, not {self.images}")
        _require(self.workers > 0, f"search.workers must be > 0, not {self.workers}")
        _require(self.captions > 5, f"search.captions must be > 5, not {self.captions}")
        _require(self.reduction > 1, f"search.reduction must be > 1, not {self.reduction}")
        _require(0 < self.level < 0.5, f"search.level must be in (0, 0.5), not {self.level}")
        _require(
            0 < self.rerun_level <= 1,
            f"search.rerun_level must be in (0, 1], not {self.rerun_level}",
        )
        _require(
            self.minutes is None or self.minutes > 0,
            f"search.minutes must be > 0 or null, not {self.minutes}",
        )
        _require(
            self.first_images is None or 0 < self.first_images <= self.images,
            f"search.first_images must be in [1, search.images = {self.images}], not "
            f"{self.first_images}",
        )
        _require(
            self.scheduler != "pbt" or (self.workers == 1 and not self.stage_one),
            "search.scheduler=pbt copies trials in mid-course: it needs search.workers=1 and "
            "search.stage_one=false",
        )
        for name in self.space:
            _require(
                _VARIED.fullmatch(name) is not None,
                f"search.space.{name}: nothing of this name can be searched; image, conv1 .. "
                "conv5, a tap such as conv3_1, rate, or with search.stage_one=true "
                "stage_one.image .., stage_one.rate and share can",
            )
            _require(
                self.stage_one or not (name == "share" or name.startswith("stage_one.")),
                f"search.space.{name} is about stage one: it needs search.stage_one=true",
            )


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
            _require(getattr(self, name) > 0, f"evaluation.judge.{name} must be > 0")
        _require(self.batch > 1, "evaluation.judge.batch must be > 1 (negatives)")
        for name in ("rate", "temperature"):
            _require(getattr(self, name) > 0, f"evaluation.judge.{name} must be > 0")
        for name in ("decay", "noise"):
            _require(getattr(self, name) >= 0, f"evaluation.judge.{name} must be >= 0")


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
            _require(getattr(self, name) > 0, f"evaluation.{name} must be > 0")
        _require(self.splits > 1, f"evaluation.splits must be > 1 (deviation), not {self.splits}")
        _require(self.seed >= 0, f"evaluation.seed must be >= 0, not {self.seed}")
        _require(self.captions is None or self.captions > 2, "evaluation.captions must be > 2")
        _require(
            self.features_size >= 32 and self.features_size % 32 == 0,
            f"evaluation.features_size must be a multiple of 32, not {self.features_size}",
        )
        _require(
            len(self.inception_sha256) >= 8,
            "evaluation.inception_sha256 must have at least 8 hexadecimal digits, not "
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
        _require(0 < self.level < 0.5, f"promotion.level must be in (0, 0.5), not {self.level}")
        _require(0 < self.margin <= 1, f"promotion.margin must be in (0, 1], not {self.margin}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run. `sdn.recipes` holds the named ones."""

    name: str
    """Name of the recipe; the registered model is called `sdn-{name}`."""
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    stage_one: StageConfig = field(default_factory=StageConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    stage_two: StageConfig = field(default_factory=StageConfig)
    stage_three: AdversarialConfig = field(default_factory=AdversarialConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    promotion: PromotionConfig = field(default_factory=PromotionConfig)
    lanes: int = 48
    """Parallel sample sequences an epoch is cut into; a world size must divide it."""
    workers: int = 1
    """Training processes (Ray workers) of a stage; must divide `lanes`."""
    max_workers: int | None = None
    """Elastic: as many processes as the cluster has room for, from `workers` up to this many; each
    of these numbers must divide `lanes`. None keeps to `workers`."""
    threads: int = 0
    """CPU threads a worker; 0 shares this machine's cores out among the workers."""

    def __post_init__(self) -> None:
        _require(self.lanes > 0, f"lanes must be > 0, not {self.lanes}")
        _require(self.threads >= 0, f"threads must be >= 0, not {self.threads}")
        most = self.workers if self.max_workers is None else self.max_workers
        _require(
            0 < self.workers <= most,
            f"workers must be > 0 and at most max_workers, not {self.workers} and {most}",
        )
        possible = [n for n in range(1, self.lanes + 1) if self.lanes % n == 0]
        wrong = [n for n in range(self.workers, most + 1) if n not in possible]
        _require(
            not wrong,
            f"workers must divide lanes ({self.lanes}), {wrong[0] if wrong else 0} does not; "
            f"possible: {possible}",
        )
        _require(
            self.stage_three.diversity == 0 or self.student.noise > 0,
            f"stage_three.diversity ({self.stage_three.diversity}) needs student.noise > 0, for "
            "without noise a caption has one image; set both, or stage_three.diversity=0",
        )
        third = ("stage_three",) if self.stage_three.epochs else ()
        for stage in ("stage_one", "stage_two", *third):
            batch = getattr(self, stage).global_batch
            _require(
                most <= batch,
                f"workers ({most}) must be at most {stage}.global_batch ({batch})",
            )


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(kind: type[T], values: dict[str, Any], where: str = "") -> T:
    """The config of this kind from plain values.

    Raises:
        ValueError: an unknown key (with the nearest known one) or a value of another type.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name: hints[f.name] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    parsed = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(_unknown(f"{where}{key}", key, list(known), where))
        parsed[key] = _parse(known[key], value, f"{where}{key}")
    return kind(**parsed)


def with_overrides(config: T, overrides: dict[str, str]) -> T:
    """The same config with dotted keys replaced: `{"stage_two.epochs": "3"}`.

    Values are read as JSON and, where that fails, as text.

    Raises:
        ValueError: an unknown key, a value of another type, or one that the config refuses.
    """
    values = to_dict(config)
    for dotted, text in overrides.items():
        *path, last = dotted.split(".")
        inner = values
        for depth, part in enumerate(path):
            if part not in inner or not isinstance(inner[part], dict):
                prefix = "".join(f"{p}." for p in path[:depth])
                raise ValueError(_unknown(dotted, part, list(inner), prefix))
            inner = inner[part]
        inner[last] = _value(type(config), dotted, text)
    return from_dict(type(config), values)


def _value(kind: Any, dotted: str, text: str) -> Any:
    """The text as JSON, or as it stands where the key holds text (`1.50` stays `1.50`)."""
    for part in dotted.split("."):
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    if text != "null" and (kind is str or kind == str | None):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _unknown(dotted: str, part: str, known: list[str], prefix: str) -> str:
    near = difflib.get_close_matches(part, known, n=1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else ""
    return (
        f"unknown config key {dotted!r}{hint}. Known here: {', '.join(prefix + k for k in known)}"
    )


def _parse(kind: Any, value: Any, where: str) -> Any:  # noqa: C901, PLR0911 (one case a type)
    """`value` as the annotated type `kind`, or a ValueError that names the key."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is a group of keys, not the value {value!r}")
        return from_dict(typing.cast("type[Any]", kind), value, f"{where}.")
    origin = typing.get_origin(kind)
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{where} must be one of {typing.get_args(kind)}, not {value!r}")
        return value
    if origin is types.UnionType:  # `X | None` is the only union in use
        (inner,) = (a for a in typing.get_args(kind) if a is not type(None))
        return None if value is None else _parse(inner, value, where)
    if origin is dict:
        inner = typing.get_args(kind)[1]
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a JSON object, not {value!r}")
        return {str(k): _entry(inner, v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{where} must be {kind.__name__}, not {value!r}")
    return value


def _entry(kind: Any, value: Any, where: str) -> Any:
    """A value of an object whose names are the user's: what it refuses names the entry."""
    try:
        return _parse(kind, value, where)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if where in text else f"{where}: {text}") from error

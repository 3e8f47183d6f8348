"""The search over loss weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from sdn.config.required import require
from sdn.config.stages import TAP_GROUPS


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Where a search looks for a value: log-uniform between two factors on the recipe's own."""

    low: float = 0.1
    """Smallest factor; at most 1, so that the recipe's own value is among the others."""
    high: float = 10.0
    """Largest factor; at least 1."""

    def __post_init__(self) -> None:
        require(
            0 < self.low <= 1 <= self.high < float("inf"),
            "low and high, factors on the recipe's own value, must satisfy 0 < low <= 1 <= high, "
            f"not {self.low} and {self.high}",
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
            value = getattr(self, name)
            require(value >= 0, f"{name} must be >= 0, not {value}")
        require(self.images > 0, f"images must be > 0, not {self.images}")
        require(self.workers > 0, f"workers must be > 0, not {self.workers}")
        require(self.captions > 5, f"captions must be > 5, not {self.captions}")
        require(self.reduction > 1, f"reduction must be > 1, not {self.reduction}")
        require(0 < self.level < 0.5, f"level must be in (0, 0.5), not {self.level}")
        require(
            0 < self.rerun_level <= 1,
            f"rerun_level must be in (0, 1], not {self.rerun_level}",
        )
        require(
            self.minutes is None or self.minutes > 0,
            f"minutes must be > 0 or null, not {self.minutes}",
        )
        require(
            self.first_images is None or 0 < self.first_images <= self.images,
            f"first_images must be in [1, search.images = {self.images}], not {self.first_images}",
        )
        require(
            self.scheduler != "pbt" or (self.workers == 1 and not self.stage_one),
            "scheduler=pbt copies trials in mid-course: it needs search.workers=1 and "
            "search.stage_one=false",
        )
        for name in self.space:
            require(
                _VARIED.fullmatch(name) is not None,
                f"space.{name}: nothing of this name can be searched; image, conv1 .. "
                "conv5, a tap such as conv3_1, rate, or with search.stage_one=true "
                "stage_one.image .., stage_one.rate and share can",
            )
            require(
                self.stage_one or not (name == "share" or name.startswith("stage_one.")),
                f"space.{name} is about stage one: it needs search.stage_one=true",
            )

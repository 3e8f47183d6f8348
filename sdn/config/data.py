"""What the data set is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdn.config.required import require

Fit = Literal["pad", "resize", "crop", "box"]


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
    validation_from_train: bool = False
    """Where files, folders or fields say which images are to train, `validation_share` is drawn
    from these too; else from images of which none says a split. For `folder`, `parquet` and
    `tars`; `cub`, `flowers` and `coco` draw from what their lists give to training in any case."""
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
        require(
            self.resolution >= 32 and self.resolution % 32 == 0,
            f"resolution must be a positive multiple of 32 (five halvings by the teacher's "
            f"pools), not {self.resolution}; try {max(32, round(self.resolution / 32) * 32)}",
        )
        require(self.shard_samples > 0, f"shard_samples must be > 0, not {self.shard_samples}")
        for name in ("validation_share", "test_share", "failure_budget"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must be in [0, 1), not {value}")
        require(
            self.validation_share + self.test_share < 1,
            "validation_share + test_share must leave something to train on (< 1), not "
            f"{self.validation_share + self.test_share}",
        )
        require(self.limit is None or self.limit > 0, f"limit must be > 0, not {self.limit}")
        require(self.max_pixels > 0, f"max_pixels must be > 0, not {self.max_pixels}")

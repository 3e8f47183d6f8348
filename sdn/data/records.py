"""What travels through the data side: records in, batches out, and what was left out on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "validation", "test")
"""Names of the splits, in the order in which they are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One captioned image as a source yields it, before preparation."""

    key: str
    """Unique in its data set; becomes the file name in the tar, so no blank, dot or slash."""
    image: bytes
    """The encoded file: PNG, JPEG, WebP, GIF, BMP or TIFF."""
    captions: tuple[str, ...]
    """At least one; as a person wrote them. The first is the main one."""
    split: str
    """One of `SPLITS`."""
    labels: dict[str, str] = field(default_factory=dict)
    """Label name -> class name; what a teacher is fitted on. Empty where the source has none."""
    where: str = ""
    """The file of the source that it came from, with the row or member in it where it has some."""
    box: tuple[float, float, float, float] | None = None
    """Where the object is: left, top, width, height in pixels of the image as it is stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion:
    """Something that a source leaves out by its own rule, such as an emoji without a name."""

    key: str
    reason: str
    """The same text for every exclusion of the same kind, so that they can be counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """Something that should have become a sample and could not be used."""

    key: str
    where: str
    """The file of the source that it came from, with the row or member in it where it has some."""
    reason: str
    """What was expected and what came."""
    image: bytes | None = None
    """The encoded file as it came, kept for a second try; None where there was none to read."""
    record: Record | None = None
    """What came, where a whole record was read and only its preparation failed."""


SourceItem = Record | Exclusion | DeadLetter


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One decoded sample of a shard."""

    key: str
    pixels: Tensor
    """(3, H, W) uint8, RGB."""
    captions: tuple[str, ...]
    """Normalised, at least one."""
    labels: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one rank consumes in one step."""

    keys: tuple[str, ...]
    """The samples really read; empty for a padded batch."""
    pixels: Tensor
    """(B, 3, H, W) uint8, RGB."""
    captions: tuple[str, ...]
    """One per row."""
    labels: tuple[dict[str, str], ...]
    """One per row."""
    epoch: int
    step: int
    """Global step at which this batch is consumed, from 0."""
    weight: float
    """Share of the global batch in this rank's rows, times the world size: 1 but in an uneven last
    batch of an epoch, 0 for a rank that only keeps the others company there."""

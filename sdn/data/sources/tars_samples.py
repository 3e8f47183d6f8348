"""Members of a tar -> samples: WebDataset's rule, and what a sample's parts say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from sdn.data.sources.folder_metadata import SPLIT_NAMES
from sdn.data.sources.layouts import caption_lines, caption_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.data.sources.tars_members import Member, Members

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Extensions of images."""
_TEXTS = ("txt", "caption", "json", "cls")
_LARGEST_TEXT = 16 << 20
_JSON_CAPTIONS = ("caption", "text", "captions")


@dataclass(slots=True)
class Sample:
    """What consecutive members of one key hold."""

    key: str
    """The members' name up to the first dot of its last part, folders kept."""
    parts: dict[str, bytes] = field(default_factory=dict)
    """Extension -> content."""
    faults: list[str] = field(default_factory=list)
    """What makes it unfit."""

    @property
    def image(self) -> bytes | None:
        """The encoded image, where there is one; of several, the first."""
        return next((self.parts[name] for name in self.parts if name in IMAGES), None)

    def only_image(self) -> bytes:
        """The encoded image.

        Raises:
            ValueError: there is none, or more than one, or a member of the sample is unfit.
        """
        images = [name for name in self.parts if name in IMAGES]
        if len(images) > 1:
            self.faults.append(f"{len(images)} images: {', '.join(images)}")
        elif not self.image:
            self.faults.append(f"no image; it has {', '.join(self.parts)}")
        if self.faults:
            raise ValueError("; ".join(self.faults))
        assert self.image is not None
        return self.image

    def about(self) -> dict[str, Any]:
        """The values of its JSON.

        Raises:
            ValueError: it is no JSON object.
        """
        try:
            values = json.loads(self.parts.get("json", b"{}").decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its json cannot be read: {error}") from error
        if not isinstance(values, dict):
            # A fault in the data, which becomes a dead letter like any other.
            raise ValueError(f"its json must be an object, not {type(values).__name__}")  # noqa: TRY004
        return values

    def captions(self, about: dict[str, Any], wanted: str | None) -> tuple[str, ...]:
        """Its captions: those of the field `wanted` of its JSON, or from the usual places.

        Raises:
            ValueError: there are none.
        """
        if wanted is not None:
            return caption_values(about.get(wanted, []), f"its json's field {wanted}")
        for extension in ("txt", "caption"):
            if extension in self.parts:
                captions = caption_lines(self.parts[extension], f"its {extension}")
                return _fuller(captions, about.get("captions"))
        for name in _JSON_CAPTIONS:
            if about.get(name):
                return caption_values(about[name], f"its json's {name}")
        raise ValueError("no caption: expected a .txt, a .caption or a .json with one")

    def labels(self, about: dict[str, Any]) -> dict[str, str]:
        """Label -> class, from `labels`, `label*` and `class*` of its JSON, and from .cls.

        Raises:
            ValueError: its .cls is not UTF-8.
        """
        labels = {
            name: value
            for name, value in about.items()
            if name.startswith(("label", "class")) and isinstance(value, str) and value
        }
        if isinstance(given := about.get("labels"), dict):
            labels |= {name: str(value) for name, value in given.items() if _is_class(value)}
        if text := self.parts.get("cls", b"").decode().strip():
            labels["cls"] = text
        return labels


@dataclass(frozen=True, slots=True)
class Refused:
    """A member that is not used."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """A member that is no part of a sample."""

    name: str


def samples(members: Members) -> Iterator[Sample | Refused | Ignored]:
    """The samples of an archive, each once it is certain that it is whole.

    Raises:
        DamagedTarError: the archive cannot be read on; the sample before that place is not given.
        OSError: the file cannot be reached.
    """
    sample: Sample | None = None
    for member in members:
        if member.refused:
            yield Refused(member.name, member.refused)
            continue
        key, extension = _key_and_extension(member.name)
        if not key or extension not in (*IMAGES, *_TEXTS):
            yield Ignored(member.name)
            continue
        # WebDataset's writers give the members of a sample in a row.
        if sample is not None and (sample.key != key or extension in sample.parts):
            yield sample
            sample = None
        sample = sample or Sample(key)
        sample.parts[extension] = _content(members, member, extension, sample)
    if sample is not None:
        yield sample


def split_of(about: dict[str, Any]) -> str | None:
    """The split that a sample's JSON names; None where it names none.

    Raises:
        ValueError: it is not one of `SPLIT_NAMES`.
    """
    split = about.get("split")
    if split is not None and (not isinstance(split, str) or split not in SPLIT_NAMES):
        raise ValueError(f"its json's split must be one of {', '.join(SPLIT_NAMES)}, not {split!r}")
    return None if split is None else SPLIT_NAMES[split]


def _content(members: Members, member: Member, extension: str, sample: Sample) -> bytes:
    if extension not in IMAGES and member.size > _LARGEST_TEXT:
        sample.faults.append(f"{member.name} has {member.size} bytes, at most {_LARGEST_TEXT}")
        return b""
    return members.content(member)


def _key_and_extension(name: str) -> tuple[str, str]:
    """Empty where there is no key; `./a.jpg` is `a.jpg`."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    is_ours = stem.startswith("__") and stem.endswith("__")  # WebDataset's notes on an archive
    return (str(path.with_name(stem)) if stem and not is_ours else ""), extension.lower()


def _fuller(captions: tuple[str, ...], listed: Any) -> tuple[str, ...]:
    """Our own shards have the first caption as text, and all of them in the JSON."""
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        return captions
    return tuple(listed) if {*captions} <= {text.strip() for text in listed} else captions


def _is_class(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""

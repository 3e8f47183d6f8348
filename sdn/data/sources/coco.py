"""COCO captions (Chen et al. 2015), and other sets in its layout.

The folder holds `annotations/captions_*.json` and the images in a folder named as the annotations
are (`train2017` of `captions_train2017.json`), in `train2017/`, `val2017/` or `images/`, or beside
`annotations/`. The images of `captions_val*.json` and `captions_test*.json` are the test split; the
others are split by the hash of the image file with the configured shares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources import PARTITION_RECORDS
from sdn.data.sources.captioned_files import split_by_hash
from sdn.data.sources.coco_annotations import entries
from sdn.data.sources.layouts import content, found_in, path_inside, place
from sdn.data.sources.listing import Listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.config import DataConfig
    from sdn.data.files import Files
    from sdn.data.records import SourceItem
    from sdn.data.sources import Partition
    from sdn.data.sources.listing import Entry

_ANNOTATIONS = "annotations"
_FILE = re.compile(rf"{_ANNOTATIONS}/captions_([^/]+)\.json")
_FOLDERS = ("train2017", "val2017", "images", "")


@dataclass(frozen=True, slots=True)
class _Images:
    """Some of the images, and of the entries that could not be understood."""

    files: Files
    config: DataConfig
    entries: tuple[Entry, ...]

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        for entry in self.entries:
            about = entry.about
            if "reason" in about:
                yield DeadLetter(key=entry.key, where=entry.path, reason=about["reason"])
            elif not about["captions"]:
                yield Exclusion(key=entry.key, reason="an image without captions")
            else:
                yield self._item(entry.key, about)

    def _item(self, key: str, about: dict[str, Any]) -> Record | DeadLetter:
        group, where = about["group"], about["image"]
        try:
            where = _found(self.files, group, about["image"])
            image = content(self.files, where)
        except ValueError as error:
            return DeadLetter(key=key, where=where, reason=str(error))
        kept = group.startswith(("val", "test"))
        return Record(
            key=key,
            image=image,
            captions=tuple(about["captions"]),
            split="test" if kept else split_by_hash(image, self.config),
            where=where,
        )


def partitions(config: DataConfig, files: Files | None) -> Iterator[Partition]:
    """Every image that an annotation file lists, with its captions.

    Raises:
        ValueError: there is no annotation file, or one is damaged.
    """
    files = place(config, files, f"the folder with {_ANNOTATIONS}/captions_*.json and the images")
    names = sorted(about.name for about in files.walk(_ANNOTATIONS) if _FILE.fullmatch(about.name))
    if not names:
        raise ValueError(
            f"{files.uri} lacks {_ANNOTATIONS}/captions_*.json, such as captions_train2017.json of "
            f"annotations_trainval2017.zip; {found_in(files)}; data.path must be the folder above "
            f"{_ANNOTATIONS}/"
        )
    listing = Listing()
    for name in names:
        _list_images(files, name, listing)
        _list_captions(files, name, listing)
    return _chunks(config, files, listing)


def _chunks(config: DataConfig, files: Files, listing: Listing) -> Iterator[Partition]:
    try:
        for chunk in listing.chunks(PARTITION_RECORDS):
            yield _Images(files, config, chunk)
    finally:
        listing.close()


def _list_images(files: Files, name: str, listing: Listing) -> None:
    for number, image in enumerate(entries(files, name, "images")):
        try:
            _add_image(name, image, listing)
        except ValueError as error:
            listing.add(f"{name}:images[{number}]", reason=str(error))


def _add_image(name: str, image: Any, listing: Listing) -> None:
    match = _FILE.fullmatch(name)
    assert match is not None
    path = path_inside(_field(image, "file_name", str))
    identity = _field(image, "id", int)
    about: dict[str, Any] = {"group": match[1], "image": path, "captions": []}
    if not listing.add(f"{name}:{identity}", key_from=f"{match[1]}/{path}", **about):
        raise ValueError(f"an earlier image has the same id, {identity}")


def _list_captions(files: Files, name: str, listing: Listing) -> None:
    # A second pass over the file, because nothing says which of the two lists comes first.
    for number, annotation in enumerate(entries(files, name, "annotations")):
        try:
            _add_caption(name, annotation, listing)
        except ValueError as error:
            listing.add(f"{name}:annotations[{number}]", reason=str(error))


def _add_caption(name: str, annotation: Any, listing: Listing) -> None:
    caption = _field(annotation, "caption", str)
    identity = _field(annotation, "image_id", int)
    about = listing.get(f"{name}:{identity}")
    if about is None:
        raise ValueError(f"no image has the id {identity}")
    about["captions"].append(caption)
    listing.note(f"{name}:{identity}", **about)


def _field(entry: Any, name: str, kind: type) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or _blank(value):
        what = "number" if kind is int else "text"
        raise ValueError(f"expected an object whose {name} is a {what}, not {str(entry)[:80]}")
    return value


def _blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _found(files: Files, group: str, image: str) -> str:
    """The name of an image's file."""
    folders = (group, *_FOLDERS)
    candidates = [f"{folder}/{image}" if folder else image for folder in dict.fromkeys(folders)]
    found = next((name for name in candidates if files.exists(name)), None)
    if found is None:
        raise ValueError(f"there is no file {', '.join(candidates)}")
    return found

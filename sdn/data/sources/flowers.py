"""Oxford-102 flowers (Nilsback & Zisserman 2008) with the captions and lists of Reed et al. 2016.

The folder holds `jpg/image_00001.jpg` ... and `imagelabels.mat` as published, `text_c10/` with
`class_00001/image_06734.txt` (a caption a line), and `trainvalclasses.txt` and `testclasses.txt`,
which share no class: all images of the test classes are the test split. Validation is drawn from
the images of the other classes by the hash of the image file, `validation_share` of them; so
`test_share` says nothing here.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources import PARTITION_RECORDS
from sdn.data.sources.captioned_files import split_by_hash
from sdn.data.sources.layouts import caption_lines, content, found_in, place
from sdn.data.sources.listing import Listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.config import DataConfig
    from sdn.data.files import Files
    from sdn.data.records import SourceItem
    from sdn.data.sources import Partition
    from sdn.data.sources.listing import Entry

_IMAGES = "jpg"
_LABELS = "imagelabels.mat"
_TEXTS = "text_c10"
_TRAINVAL = "trainvalclasses.txt"
_TEST = "testclasses.txt"
_PARTS = {
    f"{_IMAGES}/": "the images, in 102flowers.tgz",
    _LABELS: "the class of each image, published beside 102flowers.tgz",
    f"{_TEXTS}/": "the captions of Reed et al. 2016",
    _TRAINVAL: "the classes to train on, with the captions of Reed et al.",
    _TEST: "the classes to test on, with the captions of Reed et al.",
}
_IMAGE = re.compile(r"image_(\d{5})")
_CLASS = re.compile(r"class_\d{5}")


@dataclass(frozen=True, slots=True)
class _Images:
    """Some of the images."""

    files: Files
    config: DataConfig
    entries: tuple[Entry, ...]
    splits: dict[str, str]

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        for entry in self.entries:
            flower = entry.about["class"]
            if flower is not None and flower not in self.splits:
                yield Exclusion(key=entry.key, reason="its class is in neither list of classes")
            else:
                yield self._item(entry, flower)

    def _item(self, entry: Entry, flower: str | None) -> Record | DeadLetter:
        image = None
        try:
            image = content(self.files, entry.path)
            text = _text(entry, flower)
            captions = caption_lines(content(self.files, text), text)
        except ValueError as error:
            return DeadLetter(key=entry.key, where=entry.path, reason=str(error), image=image)
        assert flower is not None
        split = self.splits[flower]
        return Record(
            key=entry.key,
            image=image,
            captions=captions,
            split="test" if split == "test" else split_by_hash(image, self.config, test_share=0),
            labels={"concept": flower},
            where=entry.path,
        )


def partitions(config: DataConfig, files: Files | None) -> Iterator[Partition]:
    """Every image with its captions, in the order of their paths' hashes.

    Raises:
        ValueError: a part of the layout is missing or contradicts another.
        ImportError: scipy, which reads `imagelabels.mat`, is not installed.
    """
    files = place(config, files, f"the folder with {', '.join(_PARTS)}")
    _check_parts(files)
    splits = _splits(files)
    return _chunks(config, files, _listed(files, _labels(files)), splits)


def _chunks(
    config: DataConfig, files: Files, listing: Listing, splits: dict[str, str]
) -> Iterator[Partition]:
    try:
        for entries in listing.chunks(PARTITION_RECORDS):
            yield _Images(files, config, entries, splits)
    finally:
        listing.close()


def _check_parts(files: Files) -> None:
    missing = [f"{part} ({what})" for part, what in _PARTS.items() if not _is_there(files, part)]
    if missing:
        inside = files.exists("image_00001.jpg")
        hint = f"; data.path must be the folder above {_IMAGES}/" * inside
        raise ValueError(f"{files.uri} lacks {'; '.join(missing)}; {found_in(files)}{hint}")


def _is_there(files: Files, part: str) -> bool:
    if part.endswith("/"):
        return next(iter(files.walk(part[:-1])), None) is not None
    return files.exists(part)


def _splits(files: Files) -> dict[str, str]:
    """Class -> train (of which validation is drawn) or test."""
    splits: dict[str, str] = {}
    for name, split in ((_TRAINVAL, "train"), (_TEST, "test")):
        for flower in files.read(name).decode("utf-8-sig", errors="replace").split():
            if not _CLASS.fullmatch(flower):
                raise ValueError(f"{name} must hold lines such as class_00001, but has {flower!r}")
            if splits.setdefault(flower, split) != split:
                raise ValueError(f"{_TRAINVAL} and {_TEST} must share no class, both name {flower}")
    if not splits:
        raise ValueError(f"{_TRAINVAL} and {_TEST} are empty: expected lines such as class_00001")
    return splits


def _labels(files: Files) -> list[int]:
    """The class of each image, from 1."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            f"reading {_LABELS} needs scipy: pip install 'sdn[pipeline]' or pip install scipy"
        ) from error
    data = files.read(_LABELS)
    try:
        labels = loadmat(io.BytesIO(data))["labels"]
        return [int(label) for label in labels.ravel()]
    # scipy raises whatever a damaged file leads it into.
    except Exception as error:
        raise ValueError(
            f"{_LABELS} must be the published MATLAB file with the numbers 'labels', but cannot be "
            f"read ({type(error).__name__}: {error}); get it again"
        ) from error


def _listed(files: Files, labels: list[int]) -> Listing:
    """Every image that is there or has a text, with its class and its texts."""
    listing = Listing()
    for about in files.walk(_IMAGES):
        path = PurePosixPath(about.name)
        if path.suffix.lower() in (".jpg", ".jpeg"):
            _add(listing, about.name, labels)
    for about in files.walk(_TEXTS):
        path = PurePosixPath(about.name)
        if path.suffix == ".txt" and len(path.parts) == 3:
            image = f"{_IMAGES}/{path.stem}.jpg"
            _add(listing, image, labels)
            noted: dict[str, Any] = listing.get(image) or {}
            noted["texts"] = sorted([*noted["texts"], about.name])
            listing.note(image, **noted)
    return listing


def _add(listing: Listing, image: str, labels: list[int]) -> None:
    path = PurePosixPath(image)
    match = _IMAGE.fullmatch(path.stem)
    number = int(match[1]) if match else 0
    flower = f"class_{labels[number - 1]:05d}" if 0 < number <= len(labels) else None
    listing.add(image, key_from=path.name, **{"class": flower, "texts": []})


def _text(entry: Entry, flower: str | None) -> str:
    """The text with the captions of an image."""
    if flower is None:
        raise ValueError(
            f"expected a name such as image_00001.jpg with a number that {_LABELS} has a class for"
        )
    texts: list[str] = entry.about["texts"]
    stem = PurePosixPath(entry.path).stem
    if not texts:
        raise ValueError(f"no captions: expected {_TEXTS}/{flower}/{stem}.txt")
    folders = [PurePosixPath(text).parts[1] for text in texts]
    if folders != [flower]:
        raise ValueError(
            f"{_LABELS} says {flower}, but its captions lie in {', '.join(folders)} of {_TEXTS}"
        )
    return texts[0]

"""CUB-200-2011 (Wah et al. 2011) with the captions and class lists of Reed et al. 2016.

The folder holds `CUB_200_2011/` (`images.txt`, `images/`) as published, `text_c10/` with ten
captions an image, and `trainvalclasses.txt` and `testclasses.txt`, which share no class: all images
of the test classes are the test split. Validation is drawn from the images of the other classes by
the hash of the image file, `validation_share` of them; so its classes are trained on, and
`test_share` says nothing here. Images come whole; with the fit `box`, each has its bounding box of
`CUB_200_2011/bounding_boxes.txt` with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources import PARTITION_RECORDS
from sdn.data.sources.captioned_files import split_by_hash
from sdn.data.sources.layouts import caption_lines, place
from sdn.data.sources.listing import Listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.config import DataConfig
    from sdn.data.files import Files
    from sdn.data.records import SourceItem
    from sdn.data.sources import Partition
    from sdn.data.sources.listing import Entry

_PUBLISHED = "CUB_200_2011"
_LIST = f"{_PUBLISHED}/images.txt"
_IMAGES = f"{_PUBLISHED}/images"
_BOXES = f"{_PUBLISHED}/bounding_boxes.txt"
_TEXTS = "text_c10"
_TRAINVAL = "trainvalclasses.txt"
_TEST = "testclasses.txt"
_PARTS = {
    _LIST: "the list of images, in CUB_200_2011.tgz",
    _IMAGES: "the images, in CUB_200_2011.tgz",
    _TEXTS: "the captions of Reed et al. 2016",
    _TRAINVAL: "the classes to train on, with the captions of Reed et al.",
    _TEST: "the classes to test on, with the captions of Reed et al.",
}
_FOLDERS = (_IMAGES, _TEXTS)


@dataclass(frozen=True, slots=True)
class _Images:
    """Some of the images."""

    files: Files
    config: DataConfig
    entries: tuple[Entry, ...]
    """Noted: `is_test`, None for an unknown class, and the `box`, None where it is not asked for.
    Paths are `class/name.jpg`."""

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        for entry in self.entries:
            if entry.about["is_test"] is None:
                yield Exclusion(key=entry.key, reason="its class is in neither list of classes")
            else:
                yield self._item(entry)

    def _item(self, entry: Entry) -> Record | DeadLetter:
        image, where = None, f"{_IMAGES}/{entry.path}"
        try:
            image = _image(self.files, where)
            captions = _captions(self.files, entry.path)
        except ValueError as error:
            return DeadLetter(key=entry.key, where=where, reason=str(error), image=image)
        is_test, box = entry.about["is_test"], entry.about["box"]
        return Record(
            key=entry.key,
            image=image,
            captions=captions,
            split="test" if is_test else split_by_hash(image, self.config, test_share=0),
            labels={"concept": _class_of(entry.path)},
            where=where,
            box=None if box is None else (box[0], box[1], box[2], box[3]),
        )


def partitions(config: DataConfig, files: Files | None) -> Iterator[Partition]:
    """Every image that `images.txt` lists and a class list knows, with its captions.

    Images come in the order of their paths' hashes, so that a limit takes some of every class.

    Raises:
        ValueError: a part of the layout is missing or contradicts another.
    """
    files = place(
        config, files, f"the folder that holds {_PUBLISHED}/, {_TEXTS}/, {_TRAINVAL} and {_TEST}"
    )
    _check_parts(files, config)
    is_test_class = _classes(files)
    listed = _listed(files)
    if not any(_class_of(path) in is_test_class for path in listed.values()):
        raise ValueError(
            f"no image of {_LIST} is of a class in {_TRAINVAL} or {_TEST}: "
            "the lists hold names such as 001.Black_footed_Albatross, one a line"
        )
    boxes = _boxes(files) if config.fit == "box" else {}
    return _chunks(config, files, listed, is_test_class, boxes)


def _chunks(
    config: DataConfig,
    files: Files,
    listed: dict[str, str],
    is_test_class: dict[str, bool],
    boxes: dict[str, tuple[float, ...]],
) -> Iterator[Partition]:
    listing = Listing()
    try:
        for number, path in listed.items():
            listing.add(
                path,
                key_from=PurePosixPath(path).name,
                is_test=is_test_class.get(_class_of(path)),
                box=boxes.get(number),
            )
        for entries in listing.chunks(PARTITION_RECORDS):
            yield _Images(files, config, entries)
    finally:
        listing.close()


def _class_of(path: str) -> str:
    return path.partition("/")[0]


def _captions(files: Files, path: str) -> tuple[str, ...]:
    text = str(PurePosixPath(_TEXTS, path).with_suffix(".txt"))
    name = PurePosixPath(text).name
    try:
        data = files.read(text)
    except FileNotFoundError as error:
        raise ValueError(f"no captions: expected {text}") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error
    # In three of the published texts every blank is two replacement characters.
    return tuple(caption.replace("\ufffd", " ") for caption in caption_lines(data, name))


def _image(files: Files, path: str) -> bytes:
    try:
        return files.read(path)
    except OSError as error:
        raise ValueError(f"the image cannot be read: {error.strerror or error}") from error


def _check_parts(files: Files, config: DataConfig) -> None:
    parts = _PARTS
    if config.fit == "box":
        parts = parts | {_BOXES: "the bounding boxes, in CUB_200_2011.tgz; data.fit is 'box'"}
    missing = [f"{part} ({what})" for part, what in parts.items() if not _is_there(files, part)]
    if missing:
        hint = f"; data.path must be the folder above {_PUBLISHED}" * files.exists("images.txt")
        raise ValueError(f"{files.uri} lacks {'; '.join(missing)}{hint}")


def _is_there(files: Files, part: str) -> bool:
    if part in _FOLDERS:
        return next(files.walk(part), None) is not None
    return files.exists(part)


def _classes(files: Files) -> dict[str, bool]:
    """Class name -> whether it is one to test on."""
    trainval, test = _lines(files, _TRAINVAL), _lines(files, _TEST)
    if both := set(trainval) & set(test):
        raise ValueError(
            f"{_TRAINVAL} and {_TEST} must share no class, but both name {', '.join(sorted(both))}"
        )
    return dict.fromkeys(trainval, False) | dict.fromkeys(test, True)


def _listed(files: Files) -> dict[str, str]:
    """Number of an image -> `class/name.jpg`, as `images.txt` has them."""
    paths = {}
    for line_number, line in enumerate(_lines(files, _LIST), start=1):
        number, _, name = line.partition(" ")
        path = PurePosixPath(name.strip())
        if len(path.parts) != 2 or ".." in path.parts or path.is_absolute():
            raise ValueError(
                f"{_LIST} must hold lines such as "
                f"'1 001.Black_footed_Albatross/name.jpg', but line {line_number} is {line!r}"
            )
        if number in paths:
            raise ValueError(
                f"{_LIST} gives the number {number} twice, again in line {line_number}"
            )
        paths[number] = str(path)
    return paths


def _boxes(files: Files) -> dict[str, tuple[float, ...]]:
    """Number of an image -> left, top, width, height in pixels."""
    boxes: dict[str, tuple[float, ...]] = {}
    for line_number, line in enumerate(_lines(files, _BOXES), start=1):
        number, *values = line.split()
        try:
            box = tuple(map(float, values))
        except ValueError:
            box = ()
        if len(box) != 4:
            raise ValueError(
                f"{_BOXES} must hold lines such as '1 60.0 27.0 325.0 304.0' (number of the image, "
                f"left, top, width, height), but line {line_number} is {line!r}"
            )
        boxes[number] = box
    return boxes


def _lines(files: Files, name: str) -> list[str]:
    try:
        lines = files.read(name).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8, but its byte {error.start} is not") from error
    return [stripped for line in lines if (stripped := line.strip())]

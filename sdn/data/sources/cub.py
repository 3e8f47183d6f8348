"""CUB-200-2011 (Wah et al. 2011) with the captions and class lists of Reed et al. 2016.

The folder holds `CUB_200_2011/` (`images.txt`, `images/`) as published, `text_c10/` with ten
captions an image, and `trainvalclasses.txt` and `testclasses.txt`, which share no class: all images
of the test classes are the test split. Validation is drawn from the images of the other classes by
the hash of the image file, `validation_share` of them; so its classes are trained on, and
`test_share` says nothing here. Whole images; the bounding boxes are not used.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources.captioned_files import by_hash, captions_in, split_by_hash, unique_keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.config import DataConfig
    from sdn.data.records import SourceItem

_PUBLISHED = "CUB_200_2011"
_TEXTS = "text_c10"
_TRAINVAL = "trainvalclasses.txt"
_TEST = "testclasses.txt"
_PARTS = {
    f"{_PUBLISHED}/images.txt": "the list of images, in CUB_200_2011.tgz",
    f"{_PUBLISHED}/images": "the images, in CUB_200_2011.tgz",
    _TEXTS: "the captions of Reed et al. 2016",
    _TRAINVAL: "the classes to train on, with the captions of Reed et al.",
    _TEST: "the classes to test on, with the captions of Reed et al.",
}


def read(config: DataConfig) -> Iterator[SourceItem]:
    """Every image that `images.txt` lists and a class list knows, with its captions.

    Images come in the order of their paths' hashes, so that a limit takes some of every class. Only
    one image is held at a time.

    Raises:
        ValueError: a part of the layout is missing or contradicts another.
    """
    root = _root(config)
    is_test_class = _classes(root)
    listed = _listed(root)
    if not any(path.parts[0] in is_test_class for path in listed):
        raise ValueError(
            f"no image of {_PUBLISHED}/images.txt is of a class in {_TRAINVAL} or {_TEST}: "
            "the lists hold names such as 001.Black_footed_Albatross, one a line"
        )
    return _items(root, listed, is_test_class, config)


def _items(
    root: Path, listed: list[PurePath], is_test_class: dict[str, bool], config: DataConfig
) -> Iterator[SourceItem]:
    keys = unique_keys(PurePath(path.name) for path in listed)
    for path in by_hash(listed):
        key, bird = keys[PurePath(path.name)], path.parts[0]
        if bird not in is_test_class:
            yield Exclusion(key=key, reason="its class is in neither list of classes")
            continue
        try:
            captions = _captions(root, path)
            image = _image(root, path)
        except ValueError as error:
            yield DeadLetter(key=key, where=path.as_posix(), reason=str(error))
            continue
        split = "test" if is_test_class[bird] else split_by_hash(image, config, test_share=0)
        yield Record(key=key, image=image, captions=captions, split=split, labels={"concept": bird})


def _captions(root: Path, path: PurePath) -> tuple[str, ...]:
    text = root / _TEXTS / path.with_suffix(".txt")
    if not text.is_file():
        raise ValueError(f"no captions: expected {_TEXTS}/{path.with_suffix('.txt').as_posix()}")
    # In three of the published texts every blank is two replacement characters.
    return tuple(caption.replace("\ufffd", " ") for caption in captions_in(text))


def _image(root: Path, path: PurePath) -> bytes:
    try:
        return (root / _PUBLISHED / "images" / path).read_bytes()
    except OSError as error:
        raise ValueError(f"the image cannot be read: {error.strerror}") from error


def _root(config: DataConfig) -> Path:
    if config.path is None:
        raise ValueError(
            f"data.path is not set: the source 'cub' needs the folder that holds {_PUBLISHED}/, "
            f"{_TEXTS}/, {_TRAINVAL} and {_TEST} (--set data.path=FOLDER)"
        )
    root = Path(config.path).expanduser()
    missing = [f"{part} ({what})" for part, what in _PARTS.items() if not (root / part).exists()]
    if missing:
        hint = (
            f"; data.path must be the folder above {_PUBLISHED}"
            * root.joinpath("images.txt").exists()
        )
        raise ValueError(f"{root} lacks {'; '.join(missing)}{hint}")
    return root


def _classes(root: Path) -> dict[str, bool]:
    """Class name -> whether it is one to test on."""
    trainval, test = _lines(root / _TRAINVAL), _lines(root / _TEST)
    if both := set(trainval) & set(test):
        raise ValueError(
            f"{_TRAINVAL} and {_TEST} must share no class, but both name {', '.join(sorted(both))}"
        )
    return dict.fromkeys(trainval, False) | dict.fromkeys(test, True)


def _listed(root: Path) -> list[PurePath]:
    """The images of `images.txt`, `class/name.jpg`."""
    paths = []
    for number, line in enumerate(_lines(root / _PUBLISHED / "images.txt"), start=1):
        path = PurePath(line.partition(" ")[2].strip())
        if len(path.parts) != 2:
            raise ValueError(
                f"{_PUBLISHED}/images.txt must hold lines such as "
                f"'1 001.Black_footed_Albatross/name.jpg', but line {number} is {line!r}"
            )
        paths.append(path)
    return paths


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [stripped for line in lines if (stripped := line.strip())]

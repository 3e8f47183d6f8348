"""A folder of images with captions: text files beside the images, or `metadata.jsonl`.

Beside `bird.jpg`, `bird.txt` holds its captions, one a line. `metadata.jsonl`, at any level, is
Hugging Face's imagefolder: a JSON object a line with `file_name` (relative to that file), `text` or
`caption` (a text or a list of texts), perhaps `split`; further texts become labels. An image that
has both takes the captions of `metadata.jsonl`.

The split is the field `split`, else the folder at the top (train, validation or val, test), else
drawn by the hash of the image file, so that equal files share one. Hidden files are not read.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources.captioned_files import by_hash, captions_in, split_by_hash, unique_keys
from sdn.data.sources.folder_metadata import METADATA, SPLIT_NAMES, Entry, Metadata

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.config import DataConfig
    from sdn.data.records import SourceItem

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Extensions taken for images, in either case; `metadata.jsonl` may name files with others."""

_LAYOUT = (
    f"expected images ({', '.join(IMAGES)}) at any depth, each with a text file of the same name "
    f"beside it (bird.jpg, bird.txt: one caption a line) or a line in a {METADATA}: "
    '{"file_name": "bird.jpg", "text": "a small red bird"}'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listing:
    """What lies in the folder; paths are relative to it."""

    root: Path
    images: list[PurePath]
    texts: dict[PurePath, PurePath]
    """Path without extension -> text file."""
    others: list[PurePath]
    metadata: Metadata


def read(config: DataConfig) -> Iterator[SourceItem]:
    """Every image with a caption as a record; what lacks one, or is lacking, as a dead letter.

    Images come in the order of their paths' hashes, so that a limit takes some of every part. Only
    one image is held at a time.

    Raises:
        ValueError: there is no such folder, or it holds no image, or not a single caption.
    """
    listing = _list(_root(config))
    if not listing.images:
        raise ValueError(f"no image in {listing.root}: found {_found(listing)}; {_LAYOUT}")
    return _items(listing, config)


def _items(listing: _Listing, config: DataConfig) -> Iterator[SourceItem]:
    yield from _left_out(listing)
    yield from listing.metadata.dead_letters
    captioned = False
    first_reason = ""
    keys = unique_keys(listing.images)
    for path in by_hash(listing.images):
        try:
            record = _record(listing, path, keys[path], config)
        except ValueError as error:
            first_reason = first_reason or f"{path}: {error}"
            yield DeadLetter(key=keys[path], where=str(path), reason=str(error))
        else:
            captioned = True
            yield record
    if not captioned:
        raise ValueError(
            f"no image with a caption in {listing.root}: found {_found(listing)} "
            f"({first_reason}); {_LAYOUT}"
        )


def _record(listing: _Listing, path: PurePath, key: str, config: DataConfig) -> Record:
    """The record of one image.

    Raises:
        ValueError: it has no caption, or a file cannot be read.
    """
    entry = listing.metadata.entries.get(path, Entry())
    captions = entry.captions or _captions_beside(listing, path)
    try:
        image = (listing.root / path).read_bytes()
    except OSError as error:
        raise ValueError(f"the image cannot be read: {error.strerror}") from error
    split = entry.split or _split_of_folder(path) or split_by_hash(image, config)
    return Record(key=key, image=image, captions=captions, split=split, labels=entry.labels)


def _captions_beside(listing: _Listing, path: PurePath) -> tuple[str, ...]:
    beside = listing.texts.get(path.with_suffix(""))
    if beside is not None:
        return captions_in(listing.root / beside)
    expected = path.with_suffix(".txt").name
    if path in listing.metadata.entries:
        raise ValueError(
            f"its line in {METADATA} has neither text nor caption, and there is no {expected}"
        )
    raise ValueError(f"no caption: expected {expected} beside it or a line in a {METADATA}")


def _split_of_folder(path: PurePath) -> str | None:
    return SPLIT_NAMES.get(path.parts[0]) if len(path.parts) > 1 else None


def _root(config: DataConfig) -> Path:
    if config.path is None:
        raise ValueError(
            "data.path is not set: the source 'folder' needs the folder of your images "
            f"(--set data.path=FOLDER); {_LAYOUT}"
        )
    root = Path(config.path).expanduser()
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise ValueError(f"data.path must be a folder, but {root} is {found}; {_LAYOUT}")
    return root


def _list(root: Path) -> _Listing:
    files = _files(root)
    metadata = Metadata(root)
    for path in files:
        if path.name == METADATA:
            metadata.read(path)
    images = {path for path in files if path.suffix.lower() in IMAGES} | set(metadata.entries)
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    others = set(files) - images - set(texts.values())
    return _Listing(
        root=root,
        images=sorted(images),
        texts=texts,
        others=sorted(path for path in others if path.name != METADATA),
        metadata=metadata,
    )


def _files(root: Path) -> list[PurePath]:
    """Relative paths of all files that are not hidden; links are followed, but in no circle."""
    found: list[PurePath] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = PurePath(folder).relative_to(root)
        found += [relative / name for name in names if not name.startswith(".")]
    return sorted(found)


def _left_out(listing: _Listing) -> Iterator[Exclusion]:
    stems = {image.with_suffix("") for image in listing.images}
    for stem, path in listing.texts.items():
        if stem not in stems:
            yield Exclusion(key=str(path), reason="text file without an image of its name")
    for path in listing.others:
        kind = path.suffix.lower() or "no extension"
        yield Exclusion(key=str(path), reason=f"not taken for an image ({kind})")


def _found(listing: _Listing) -> str:
    """The numbers of files by kind, for an error."""
    kinds = Counter(path.suffix.lower() or "no extension" for path in listing.others)
    parts = [f"{len(listing.images)} images", f"{len(listing.texts)} text files"]
    parts += [f"{number} {kind}" for kind, number in kinds.most_common(5)]
    if listing.metadata.dead_letters:
        first = listing.metadata.dead_letters[0]
        parts.append(f"{len(listing.metadata.dead_letters)} unusable lines ({first.reason})")
    return ", ".join(parts)

"""A folder of images with captions: text files beside the images, or tables.

Beside `bird.jpg`, `bird.txt` holds its captions, one a line. `metadata.jsonl`, at any level, is
Hugging Face's imagefolder: a JSON object a line with `file_name` (relative to that file), `text` or
`caption` (a text or a list of texts), perhaps `split`; further texts become labels. `captions.csv`
and `captions.tsv`, at any level, have the same in columns: the file under `file_name`, `file`,
`image`, `filename` or `path`, its caption under `caption`, `text` or `title`; several rows of a
file are several captions, further columns are labels unless they hold numbers. `data.image_field`
and `data.caption_field` name other fields. An image that has both takes the captions of the table.

The split is the field `split`, else the folder at the top (train, validation or val, test), else
drawn by the hash of the image file, so that equal files share one; with
`data.validation_from_train` some of train is drawn to validate. Hidden files are not read.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources import PARTITION_RECORDS
from sdn.data.sources.captioned_files import split_of_image
from sdn.data.sources.folder_metadata import (
    METADATA,
    SPLIT_NAMES,
    TABLES,
    BadRow,
    Row,
    is_table,
    rows,
)
from sdn.data.sources.layouts import caption_lines, place
from sdn.data.sources.listing import Entry, Listing, plain_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.config import DataConfig
    from sdn.data.files import Files
    from sdn.data.records import SourceItem
    from sdn.data.sources import Partition

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Extensions taken for images, in either case; a table may name files with others."""

_LAYOUT = (
    f"expected images ({', '.join(IMAGES)}) at any depth, each with a text file of the same name "
    f"beside it (bird.jpg, bird.txt: one caption a line), a line in a {METADATA}: "
    '{"file_name": "bird.jpg", "text": "a small red bird"}, or a row in a captions.csv with the '
    "columns file_name and caption"
)
_TABLE_NAMES = f"{METADATA} or {' or '.join(TABLES)}"


@dataclass(frozen=True, slots=True)
class _Images:
    """Some of the images."""

    files: Files
    config: DataConfig
    entries: tuple[Entry, ...]

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        for entry in self.entries:
            yield self._item(entry)

    def _item(self, entry: Entry) -> Record | DeadLetter:
        image, where = None, _printable(entry.path)
        try:
            image = _read(self.files, entry.path, "the image")
            captions = tuple(entry.about["captions"]) or _captions_beside(self.files, entry)
        except ValueError as error:
            return DeadLetter(key=entry.key, where=where, reason=str(error), image=image)
        declared = entry.about["split"] or _split_of_folder(entry.path)
        return Record(
            key=entry.key,
            image=image,
            captions=captions,
            split=split_of_image(declared, image, self.config),
            labels=entry.about["labels"],
            where=where,
        )


@dataclass(frozen=True, slots=True)
class _BadRows:
    """Some of the lines of tables that cannot be used."""

    entries: tuple[Entry, ...]

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        for entry in self.entries:
            yield DeadLetter(
                key=entry.about["key"], where=_printable(entry.path), reason=entry.about["reason"]
            )


@dataclass(frozen=True, slots=True)
class _LeftOut:
    """Some of the files that are neither images nor captions of one."""

    entries: tuple[Entry, ...]

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        for entry in self.entries:
            if not entry.about["used"]:
                name = _printable(entry.about["file"])
                yield Exclusion(key=name, reason=entry.about["reason"])


@dataclass(frozen=True, slots=True)
class _Found:
    """What lies in the folder, all of it on disk."""

    images: Listing = field(default_factory=Listing)
    """Noted: `captions`, `split` and `labels` out of tables, `named` by which table."""
    others: Listing = field(default_factory=Listing)
    """Noted: the `file`, whether it is `used`, and the `reason` to leave it out. A text is listed
    under its path with the extension `.txt`, whatever case it has."""
    tables: Listing = field(default_factory=Listing)
    bad_rows: Listing = field(default_factory=Listing)
    """By `table:line`; noted: `key` and `reason`."""

    def close(self) -> None:
        """Delete it."""
        for listing in (self.images, self.others, self.tables, self.bad_rows):
            listing.close()


def partitions(config: DataConfig, files: Files | None) -> Iterator[Partition]:
    """Every image with a caption as a record; what lacks one, or is lacking, as a dead letter.

    Lines of tables that cannot be used come first, then the images in the order of their paths'
    hashes, so that a limit takes some of every part, then the files that were left out.

    Raises:
        ValueError: there is no such folder, it holds no image or not a single caption, or a table
            lacks a column.
    """
    files = place(config, files, f"the folder of your images; {_LAYOUT}")
    _check_folder(files)
    found = _Found()
    try:
        _list(files, found)
        _read_tables(files, found, config)
        _check_found(files, found)
    except BaseException:
        found.close()
        raise
    return _chunks(config, files, found)


def _chunks(config: DataConfig, files: Files, found: _Found) -> Iterator[Partition]:
    with contextlib.closing(found):
        for entries in found.bad_rows.chunks(PARTITION_RECORDS):
            yield _BadRows(entries)
        for entries in found.images.chunks(PARTITION_RECORDS):
            yield _Images(files, config, tuple(_with_text(found, entry) for entry in entries))
        for entries in found.others.chunks(PARTITION_RECORDS):
            if not all(entry.about["used"] for entry in entries):
                yield _LeftOut(entries)


def _with_text(found: _Found, entry: Entry) -> Entry:
    """The entry with the text file beside it, which then is not left over."""
    beside = _text_path(entry.path)
    noted = found.others.get(beside)
    if noted is not None and not noted["used"]:
        found.others.note(beside, **(noted | {"used": True}))
    text = None if noted is None else noted["file"]
    return Entry(entry.path, entry.key, entry.about | {"text": text})


def _list(files: Files, found: _Found) -> None:
    for about in files.walk():
        suffix = PurePosixPath(about.name).suffix.lower()
        if is_table(about.name):
            found.tables.add(about.name)
        elif suffix in IMAGES:
            _add_image(found, about.name)
        elif suffix == ".txt":
            _add_text(found, about.name)
        else:
            _add_other(found, about.name)


def _add_image(found: _Found, path: str) -> None:
    found.images.add(path, captions=[], split=None, labels={}, named=None)


def _add_text(found: _Found, path: str) -> None:
    beside = _text_path(path)
    reason = "text file without an image of its name"
    if found.others.add(beside, file=path, used=False, reason=reason):
        return
    # a.txt and a.TXT: the last in the alphabet counts, in whichever order they came.
    before = (found.others.get(beside) or {})["file"]
    found.others.note(beside, file=max(before, path), used=False, reason=reason)
    _add_other(found, min(before, path))


def _add_other(found: _Found, path: str) -> None:
    kind = PurePosixPath(path).suffix.lower() or "no extension"
    reason = f"not taken for an image ({_printable(kind)})"
    found.others.add(path, file=path, used=False, reason=reason)


def _read_tables(files: Files, found: _Found, config: DataConfig) -> None:
    for table in found.tables:
        for row in rows(files, table.path, config):
            if isinstance(row, BadRow):
                found.bad_rows.add(row.where, key=row.where, reason=row.reason)
                continue
            try:
                _note_row(found, row, PurePosixPath(table.path).name)
            except ValueError as error:
                path, number = row.where.rsplit(":", 1)
                reason = f"{path} line {number}: {error}"
                found.bad_rows.add(row.where, key=plain_key(row.path), reason=reason)


def _note_row(found: _Found, row: Row, table: str) -> None:
    """Join a row with what is noted about its image.

    Raises:
        ValueError: there is no such file, or an earlier row contradicts this one.
    """
    before = found.images.get(row.path)
    if before is None:
        other = found.others.get(row.path)
        if other is None:
            raise ValueError(f"there is no file {row.path}")
        found.others.note(row.path, **(other | {"used": True}))
        _add_image(found, row.path)
    if before is None or before["named"] is None:
        before = {"captions": [], "split": row.split, "labels": row.labels}
    if (before["split"], before["labels"]) != (row.split, row.labels):
        raise ValueError("an earlier line names the same file with another split or other labels")
    captions = [*before["captions"], *row.captions]
    found.images.note(row.path, **(before | {"captions": captions, "named": table}))


def _captions_beside(files: Files, entry: Entry) -> tuple[str, ...]:
    text = entry.about["text"]
    if text is not None:
        name = PurePosixPath(text).name
        return caption_lines(_read(files, text, name), name)
    expected = PurePosixPath(_text_path(entry.path)).name
    if entry.about["named"] is not None:
        raise ValueError(
            f"its line in {entry.about['named']} has neither text nor caption, and there is no "
            f"{expected}"
        )
    raise ValueError(f"no caption: expected {expected} beside it or a line in a {_TABLE_NAMES}")


def _text_path(path: str) -> str:
    """Where the captions of an image lie, if they lie beside it."""
    return str(PurePosixPath(path).with_suffix(".txt"))


def _split_of_folder(path: str) -> str | None:
    top, below, _ = path.partition("/")
    return SPLIT_NAMES.get(top) if below else None


def _read(files: Files, path: str, what: str) -> bytes:
    try:
        return files.read(path)
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror or error}") from error


def _printable(path: str) -> str:
    """The path with the bytes spelled out that are not UTF-8."""
    return path.encode(errors="backslashreplace").decode()


def _check_folder(files: Files) -> None:
    local = Path(files.uri)
    if "://" not in files.uri and not local.is_dir():
        found = "a file" if local.exists() else "nothing"
        raise ValueError(f"data.path must be a folder, but {local} is {found}; {_LAYOUT}")


def _check_found(files: Files, found: _Found) -> None:
    if not len(found.images):
        raise ValueError(f"no image in {files.uri}: found {_counts(found)}; {_LAYOUT}")
    first = None
    for entry in found.images:
        if entry.about["captions"] or found.others.get(_text_path(entry.path)) is not None:
            return
        first = first or entry
    assert first is not None
    try:
        _captions_beside(files, Entry(first.path, first.key, first.about | {"text": None}))
    except ValueError as error:
        raise ValueError(
            f"no image with a caption in {files.uri}: found {_counts(found)} "
            f"({_printable(first.path)}: {error}); {_LAYOUT}"
        ) from error


def _counts(found: _Found) -> str:
    """The numbers of files by kind, for an error."""
    kinds = Counter(PurePosixPath(other.about["file"]).suffix.lower() for other in found.others)
    parts = [f"{len(found.images)} images", f"{kinds.pop('.txt', 0)} text files"]
    parts += [f"{number} {kind or 'no extension'}" for kind, number in kinds.most_common(5)]
    first = next(iter(found.bad_rows), None)
    if first is not None:
        parts.append(f"{len(found.bad_rows)} unusable lines ({first.about['reason']})")
    return ", ".join(parts)

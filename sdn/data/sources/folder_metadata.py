"""Tables of captions in a folder: Hugging Face's `metadata.jsonl`, `captions.csv`, `captions.tsv`.

Both give the same rows: what is said about one image at one place of one file.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.config import DataConfig
    from sdn.data.files import Files

METADATA = "metadata.jsonl"
TABLES = {"captions.csv": ",", "captions.tsv": "\t"}
"""Name of a table -> what parts its columns."""
SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
"""Names that a field `split` or a folder may have -> split."""
IMAGE_COLUMNS = ("file_name", "file", "image", "filename", "path")
CAPTION_COLUMNS = ("caption", "text", "title")
_CAPTION_FIELDS = ("text", "caption")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one line says about one image."""

    where: str
    """File and line, `metadata.jsonl:3`."""
    path: str
    """The image, relative to the source."""
    captions: tuple[str, ...] = ()
    split: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A line that cannot be used."""

    where: str
    reason: str


def is_table(path: str) -> bool:
    """Whether a file of this path is read for captions."""
    name = PurePosixPath(path).name
    return name == METADATA or name in TABLES


def rows(files: Files, path: str, config: DataConfig) -> Iterator[Row | BadRow]:
    """The lines of one file, one after the other.

    Raises:
        ValueError: the file cannot be read, or its header lacks a column.
    """
    read = _jsonl_rows if PurePosixPath(path).name == METADATA else _csv_rows
    try:
        yield from read(files, path, config)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _jsonl_rows(files: Files, path: str, config: DataConfig) -> Iterator[Row | BadRow]:
    with files.open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield _jsonl_row(path, number, line, config)
                except ValueError as error:
                    yield _bad(path, number, error)


def _jsonl_row(path: str, number: int, line: bytes, config: DataConfig) -> Row:
    values = _parse(line)
    image_field = config.image_field or "file_name"
    image = _image_path(path, values.pop(image_field, None), image_field)
    captions: list[str] = []
    for name in (config.caption_field,) if config.caption_field else _CAPTION_FIELDS:
        captions += _texts(name, values.pop(name, None))
    split = _split(values.pop("split", None))
    return Row(
        where=f"{path}:{number}",
        path=image,
        captions=tuple(captions),
        split=split,
        labels={
            name: value
            for name, value in values.items()
            if isinstance(value, str) and name not in _CAPTION_FIELDS
        },
    )


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8, but byte {error.start} of the line is not") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        # A fault in the data, which becomes a dead letter like any other.
        raise ValueError(f"expected a JSON object, not {type(values).__name__}")  # noqa: TRY004
    return values


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a text or a list of texts, not {value!r}")
    return [text for text in texts if text.strip()]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """Where a table has what; numbers of columns."""

    names: list[str]
    image: int
    caption: int
    split: int | None
    labels: tuple[int, ...]


def _csv_rows(files: Files, path: str, config: DataConfig) -> Iterator[Row | BadRow]:
    delimiter = TABLES[PurePosixPath(path).name]
    # Bytes that are not UTF-8 pass, to cost their own row only.
    with io.TextIOWrapper(
        files.open(path), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as text:
        columns = None
        for number, values in _csv_lines(text, delimiter):
            if columns is None:
                header = [] if isinstance(values, csv.Error) else values
                columns = _columns(path, header, delimiter, config)
            elif values:
                try:
                    yield _csv_row(path, number, values, columns)
                except ValueError as error:
                    yield _bad(path, number, error)
        if columns is None:
            _columns(path, [], delimiter, config)


def _csv_lines(text: TextIO, delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """The rows with the number of the line on which each begins; [] for a blank line."""
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            yield number, next(reader)
        except csv.Error as error:
            yield number, error
        except StopIteration:
            return


def _columns(path: str, header: list[str], delimiter: str, config: DataConfig) -> _Columns:
    names = [name.strip() for name in header]
    image = _column(names, config.image_field, IMAGE_COLUMNS)
    caption = _column(names, config.caption_field, CAPTION_COLUMNS)
    if image is None or caption is None:
        parted = "tabs" if delimiter == "\t" else "commas"
        raise ValueError(
            f"{path} must begin with a row of column names, parted by {parted}, in UTF-8: expected "
            f"one of {config.image_field or ', '.join(IMAGE_COLUMNS)} (the file) and one of "
            f"{config.caption_field or ', '.join(CAPTION_COLUMNS)} (the caption), found "
            f"{names}; --set data.image_field and data.caption_field name others"
        )
    split = _column(names, None, ("split",))
    others = (
        number
        for number, name in enumerate(names)
        if number not in (image, caption, split) and name.lower() not in ("", *CAPTION_COLUMNS)
    )
    return _Columns(names=names, image=image, caption=caption, split=split, labels=tuple(others))


def _column(names: list[str], configured: str | None, usual: tuple[str, ...]) -> int | None:
    if configured is not None:
        return names.index(configured) if configured in names else None
    lower = [name.lower() for name in names]
    return next((lower.index(name) for name in usual if name in lower), None)


def _csv_row(path: str, number: int, values: list[str] | csv.Error, columns: _Columns) -> Row:
    if isinstance(values, csv.Error):
        # A fault in the data, which becomes a dead letter like any other.
        raise ValueError(f"not a row of columns: {values}") from values  # noqa: TRY004
    if len(values) != len(columns.names):
        raise ValueError(f"expected {len(columns.names)} columns, got {len(values)}")
    if any("\udc80" <= character <= "\udcff" for value in values for character in value):
        raise ValueError("must be UTF-8; save the file as UTF-8")
    caption = values[columns.caption].strip()
    split = None if columns.split is None else values[columns.split].strip() or None
    return Row(
        where=f"{path}:{number}",
        path=_image_path(path, values[columns.image].strip(), columns.names[columns.image]),
        captions=(caption,) if caption else (),
        split=_split(split),
        labels={
            columns.names[label]: value
            for label in columns.labels
            if (value := values[label].strip()) and not _is_number(value)
        },
    )


def _is_number(value: str) -> bool:
    """As in JSON, where numbers are no labels; a count of captions, say, differs in each row."""
    try:
        float(value)
    except ValueError:
        return False
    return True


def _image_path(table: str, name: Any, image_field: str) -> str:
    """The image that a table names relative to itself, relative to the source."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{image_field} must name the image, not {name!r}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(table), name))
    if "\0" in name or name.startswith("/") or path == ".." or path.startswith("../"):
        raise ValueError(f"{image_field} must be a path inside the folder, not {name!r}")
    return path


def _split(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in SPLIT_NAMES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_NAMES)}, not {value!r}")
    return SPLIT_NAMES[value]


def _bad(path: str, number: int, error: ValueError) -> BadRow:
    return BadRow(where=f"{path}:{number}", reason=f"{path} line {number}: {error}")

"""Parquet tables in Hugging Face's layout: a row an image, with its caption and labels.

The split is the one that a file's name or its folder begins with (`train-00000-of-00004.parquet`,
`validation/0.parquet`), else it is drawn by the hash of the image; with
`data.validation_from_train` some of train is drawn to validate. Images are bytes in the table,
or paths relative to the table's folder or to the data's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from sdn.data.records import DeadLetter, Record
from sdn.data.sources.captioned_files import split_of_image
from sdn.data.sources.layouts import content, found_in, path_inside, place, split_in_name
from sdn.data.sources.listing import Listing, plain_key
from sdn.data.sources.parquet_columns import Columns, columns_of
from sdn.data.sources.parquet_files import WatchedFile, batch_rows, opened, require_pyarrow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.config import DataConfig
    from sdn.data.files import Files
    from sdn.data.records import SourceItem
    from sdn.data.sources import Partition

_OF_HOW_MANY = re.compile(r"-of-\d+$")
_STEM_BYTES = 56
"""Leaves room for a hash and a row below the 90 bytes that a key may have."""


@dataclass(frozen=True, slots=True)
class _RowGroup:
    """One row group of a file."""

    files: Files
    config: DataConfig
    name: str
    key: str
    """What the keys of the file's rows begin with."""
    group: int
    first: int
    """Number of its first row in the file, from 0."""

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        with self.files.open(self.name) as raw:
            file = WatchedFile(raw)
            try:
                yield from self._rows(file)
            # pyarrow raises a dozen kinds of error for damaged files, OSError among them.
            except Exception as error:
                if file.error is not None:
                    raise file.error from error
                yield _damaged(f"{self.name}:row group {self.group}", self.key, error)

    def _rows(self, file: WatchedFile) -> Iterator[SourceItem]:
        table = opened(file)
        columns = columns_of(table.schema_arrow, self.config)
        batches = table.iter_batches(
            batch_size=batch_rows(table.metadata.row_group(self.group)),
            row_groups=[self.group],
            columns=columns.names(),
            use_threads=False,
        )
        number = self.first
        for batch in batches:
            for row in range(batch.num_rows):
                # Row by row, so that only one image is there as a Python object.
                values = {name: batch.column(name)[row].as_py() for name in columns.names()}
                yield self._item(values, columns, number)
                number += 1

    def _item(self, row: dict[str, Any], columns: Columns, number: int) -> Record | DeadLetter:
        key, where, image = f"{self.key}-{number:07d}", f"{self.name}:{number}", None
        try:
            image = self._image(row[columns.image], columns.image)
            captions = columns.captions_of(row)
        except ValueError as error:
            return DeadLetter(key=key, where=where, reason=str(error), image=image)
        return Record(
            key=key,
            image=image,
            captions=captions,
            split=split_of_image(split_in_name(self.name), image, self.config),
            labels=columns.labels_of(row),
            where=where,
        )

    def _image(self, value: Any, column: str) -> bytes:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise ValueError(f"the column {column} is null: expected an image or its path")
        if isinstance(value, bytes):
            return value
        path = path_inside(value)
        beside = (PurePosixPath(self.name).parent / path).as_posix()
        for name in dict.fromkeys((beside, path)):
            if self.files.exists(name):
                return content(self.files, name)
        raise ValueError(f"there is no file {beside} (or {path}) in the data's folder")


@dataclass(frozen=True, slots=True)
class _Damaged:
    """A file that cannot be read at all."""

    letter: DeadLetter

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        yield self.letter


def partitions(config: DataConfig, files: Files | None) -> Iterator[Partition]:
    """A partition each row group, files in the order of their paths' hashes.

    Raises:
        ValueError: there is no parquet file, or one without a column for images or captions.
        ImportError: pyarrow is not installed.
    """
    files = place(config, files, "a folder with *.parquet")
    require_pyarrow()
    listing = Listing()
    for about in files.walk():
        if about.name.lower().endswith(".parquet"):
            contents = _contents(config, files, about.name)
            listing.add(about.name, key_from=_stem(about.name), **contents)
    if not len(listing):
        raise ValueError(
            f"{files.uri} has no *.parquet; {found_in(files)}; data.path must be a folder above "
            "the tables"
        )
    return _row_groups(config, files, listing)


def _row_groups(config: DataConfig, files: Files, listing: Listing) -> Iterator[Partition]:
    try:
        for entry in listing:
            if (reason := entry.about.get("reason")) is not None:
                yield _Damaged(DeadLetter(key=entry.key, where=entry.path, reason=reason))
                continue
            first = 0
            for group, rows in enumerate(entry.about["rows"]):
                yield _RowGroup(files, config, entry.path, entry.key, group, first)
                first += rows
    finally:
        listing.close()


def _contents(config: DataConfig, files: Files, name: str) -> dict[str, Any]:
    """Rows of each row group, or the reason why the file cannot be read."""
    with files.open(name) as raw:
        file = WatchedFile(raw)
        try:
            table = opened(file)
            about = table.metadata
            rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
            schema = table.schema_arrow
        except Exception as error:  # as in _RowGroup.items
            if file.error is not None:
                raise file.error from error
            return {"reason": _damaged(name, name, error).reason}
    try:
        columns_of(schema, config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return {"rows": rows}


def _stem(name: str) -> str:
    whole = PurePosixPath(name).with_suffix("")
    plain = plain_key(f"{whole.with_name(_OF_HOW_MANY.sub('', whole.name))}.parquet")
    return plain.encode()[-_STEM_BYTES:].decode(errors="ignore")


def _damaged(where: str, key: str, error: Exception) -> DeadLetter:
    text = " ".join(str(error).split())[:300]
    reason = f"not to be read as parquet ({type(error).__name__}: {text}); get the file again"
    return DeadLetter(key=key, where=where, reason=reason)


def first_absent_image(config: DataConfig, files: Files, name: str) -> str | None:
    """The first file that a table names as an image and that is not there; None for none.

    A table with the images' bytes in it names none. What cannot be read is left to its reader.
    """
    with files.open(name) as raw:
        file = WatchedFile(raw)
        try:
            table = opened(file)
            column = columns_of(table.schema_arrow, config).image
            if not _names_files(table, column):
                return None
            batches = table.iter_batches(batch_size=1024, columns=[column], use_threads=False)
            for value in (value for batch in batches for value in batch.column(0).to_pylist()):
                path = value.get("path") if isinstance(value, dict) else value
                if isinstance(path, str) and not _is_there(files, name, path):
                    return path
        # As in _RowGroup.items.
        except Exception as error:
            if file.error is not None:
                raise file.error from error
    return None


def _names_files(table: Any, column: str) -> bool:
    """Whether a column holds paths alone: texts, or structures whose bytes are all null."""
    import pyarrow as pa  # type: ignore[import-untyped]

    kind = table.schema_arrow.field(column).type
    if not pa.types.is_struct(kind):
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
    about = table.metadata
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    for group in groups:
        for leaf in (group.column(number) for number in range(group.num_columns)):
            if leaf.path_in_schema == f"{column}.bytes":
                found = leaf.statistics
                if found is None or found.null_count != group.num_rows:
                    return False
    return True


def _is_there(files: Files, table: str, name: str) -> bool:
    try:
        path = path_inside(name)
    except ValueError:
        return True  # a fault of the table, which is told when it is read
    beside = (PurePosixPath(table).parent / path).as_posix()
    return any(files.exists(one) for one in dict.fromkeys((beside, path)))

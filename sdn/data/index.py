"""Where each sample of a shard lies and what it holds, as parquet columns or read from the tar."""

from __future__ import annotations

import io
import tarfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

IMAGE_EXTENSIONS = ("png", "jpg")

LOCATION = (
    "offset",
    "length",
    "crc32",
    "image_offset",
    "image_length",
    "json_offset",
    "json_length",
)
"""Numbers that say where a sample lies; what reading needs of the index."""
DIGESTS = {"content": 16, "pixels": 16, "near": 8, "words": 8}
"""Digest -> its length in bytes; what finding duplicates needs of the index."""


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One sample of a shard: its span in the tar, and what it is recognised by."""

    key: str
    offset: int
    """First byte of the span, which is that of its first tar header, from the start of the tar."""
    length: int
    """Bytes of the span: headers, members and their padding."""
    crc32: int
    """Of the whole span."""
    image_offset: int
    """First byte of the image, from the start of the span."""
    image_length: int
    json_offset: int
    """First byte of the JSON member, from the start of the span."""
    json_length: int
    content: bytes = bytes(16)
    """Of the record as it came: image file, captions, labels, split."""
    pixels: bytes = bytes(16)
    """Of the prepared pixels."""
    near: bytes = bytes(8)
    """Of the prepared pixels, coarsely: equal for most images that look alike."""
    words: bytes = bytes(8)
    """Of the sorted words of the captions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """Where the samples of one shard lie, a column each; row r is sample r."""

    keys: Sequence[str]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    crc32: NDArray[np.int64]
    image_offset: NDArray[np.int64]
    image_length: NDArray[np.int64]
    json_offset: NDArray[np.int64]
    json_length: NDArray[np.int64]

    def __len__(self) -> int:
        """Samples of the shard."""
        return len(self.keys)


def to_parquet(rows: Sequence[IndexRow], shard: str, split: Sequence[str] | None = None) -> bytes:
    """The index of one shard as a parquet file; equal rows give equal bytes.

    Columns: key, shard, the numbers of `LOCATION`, the digests of `DIGESTS`; and split where given.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    columns: dict[str, pa.Array] = {
        "key": pa.array([row.key for row in rows], pa.string()),
        "shard": pa.array([shard] * len(rows), pa.string()),
    }
    for name in LOCATION:
        columns[name] = pa.array([getattr(row, name) for row in rows], pa.int64())
    for name, size in DIGESTS.items():
        columns[name] = pa.array([getattr(row, name) for row in rows], pa.binary(size))
    if split is not None:
        columns["split"] = pa.array(split, pa.string())
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> Index:
    """Where the samples of a shard lie, from its parquet file.

    Raises:
        ImportError: pyarrow is not installed; `scan` needs only the tar.
        ValueError: not such a file.
    """
    table = _table(data, ("key", *LOCATION))
    values: dict[str, Any] = {name: integers(table[name]) for name in LOCATION}
    return Index(keys=table["key"].to_pylist(), **values)


def integers(column: Any) -> NDArray[np.int64]:
    """A pyarrow column of int64 without gaps as an array.

    Its own `to_numpy` imports pandas where that is installed, which takes longer than all the rest.
    """
    return np.asarray(np.from_dlpack(column.combine_chunks()), np.int64)


def rows_from_parquet(data: bytes, *, with_split: bool = False) -> list[tuple[IndexRow, str]]:
    """All columns of an index, row by row, each with its split ("" where there is none).

    Raises:
        ImportError, ValueError: as `from_parquet`.
    """
    names = ("key", *LOCATION, *DIGESTS)
    table = _table(data, names + (("split",) if with_split else ()))
    columns = [table[name].to_pylist() for name in names]
    splits = table["split"].to_pylist() if with_split else [""] * table.num_rows
    return [(IndexRow(*values), split) for *values, split in zip(*columns, splits, strict=True)]


def scan(tar: BinaryIO) -> Index:
    """Where the samples of a shard lie, from the tar; its checksums describe the bytes as they are.

    So an index made this way finds no damage that was there before: check the shard's SHA-256
    first.

    Raises:
        ValueError: not a tar of whole samples (an image, `json` and `txt` in a row for each key).
    """
    rows: list[IndexRow] = []
    members: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            for info in archive:
                name = _member(info)
                if name in members:
                    raise ValueError(f"unexpected member {info.name!r}")
                members[name] = info
                if len(members) == len(MEMBERS):
                    rows.append(_row(tar, members))
                    members = {}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"not a readable tar: {error}") from error
    if members:
        raise ValueError(f"the last sample has only {sorted(members)}")
    numbers = np.array([[getattr(row, name) for name in LOCATION] for row in rows], np.int64)
    numbers = numbers.reshape(len(rows), len(LOCATION))
    values: dict[str, Any] = {name: numbers[:, n].copy() for n, name in enumerate(LOCATION)}
    return Index(keys=[row.key for row in rows], **values)


MEMBERS = ("image", "json", "txt")
"""Members of a sample, in their order in the tar; `image` carries the extension of its format."""


def _member(info: tarfile.TarInfo) -> str:
    extension = info.name.partition(".")[2]
    name = "image" if extension in IMAGE_EXTENSIONS else extension
    if name not in MEMBERS or not info.isfile():
        raise ValueError(f"unexpected member {info.name!r}")
    return name


def _row(tar: BinaryIO, members: dict[str, tarfile.TarInfo]) -> IndexRow:
    keys = {info.name.partition(".")[0] for info in members.values()}
    if len(keys) != 1 or list(members) != list(MEMBERS):
        raise ValueError(f"the members of a sample are not in a row: {sorted(keys)}")
    image, json, txt = members.values()
    end = txt.offset_data + -(-txt.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    here = tar.tell()
    tar.seek(image.offset)
    span = tar.read(end - image.offset)
    tar.seek(here)
    return IndexRow(
        key=keys.pop(),
        offset=image.offset,
        length=end - image.offset,
        crc32=zlib.crc32(span),
        image_offset=image.offset_data - image.offset,
        image_length=image.size,
        json_offset=json.offset_data - image.offset,
        json_length=json.size,
    )


def _table(data: bytes, names: tuple[str, ...]) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        # Half the time of `read_table`, and it is needed for every shard of every epoch.
        file = parquet.ParquetFile(pa.BufferReader(data))
        table = file.read(columns=list(names), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not the index of a shard: {error}") from error
    if lacking := set(names) - set(table.column_names):
        raise ValueError(f"not the index of a shard: it lacks {', '.join(sorted(lacking))}")
    return table

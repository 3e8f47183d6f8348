"""Where each sample of a shard lies: offsets, lengths and checksums, as parquet or from the tar."""

from __future__ import annotations

import io
import tarfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

MEMBERS = ("image", "txt", "json")
"""Members of a sample. In the tar `image` carries the extension of its format."""
IMAGE_EXTENSIONS = ("png", "jpg")

_FIELDS = ("offset", "length", "crc32")


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a sample: where its payload lies in the tar."""

    offset: int
    """First byte of the payload, from the start of the tar."""
    length: int
    """Bytes."""
    crc32: int
    """Of the payload."""


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One sample of a shard."""

    key: str
    image: Member
    txt: Member
    json: Member

    @property
    def start(self) -> int:
        """Offset of the sample's first payload byte."""
        return min(self.image.offset, self.txt.offset, self.json.offset)

    @property
    def end(self) -> int:
        """Offset behind the sample's last payload byte."""
        return max(m.offset + m.length for m in (self.image, self.txt, self.json))


def to_parquet(rows: list[IndexRow]) -> bytes:
    """The index of one shard as a parquet file.

    Columns: key; and for each of image, txt, json: `_offset`, `_length` (bytes), `_crc32`.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    columns: dict[str, pa.Array] = {"key": pa.array([row.key for row in rows], pa.string())}
    for member in MEMBERS:
        for field in _FIELDS:
            values = [getattr(getattr(row, member), field) for row in rows]
            columns[f"{member}_{field}"] = pa.array(values, pa.int64())
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[IndexRow]:
    """The index of one shard from its parquet file.

    Raises:
        ImportError: pyarrow is not installed; `scan` needs only the tar.
        ValueError: not such a file.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        columns = parquet.read_table(io.BytesIO(data)).to_pydict()
        members = [
            [
                Member(*values)
                for values in zip(*(columns[f"{m}_{f}"] for f in _FIELDS), strict=True)
            ]
            for m in MEMBERS
        ]
        return [IndexRow(*row) for row in zip(columns["key"], *members, strict=True)]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"not the index of a shard: {error}") from error


def scan(tar: BinaryIO) -> list[IndexRow]:
    """The index of one shard from the tar itself; its checksums describe the bytes as they are.

    So an index made this way finds no damage that was there before: check the shard's SHA-256
    first.

    Raises:
        ValueError: not a tar of whole samples (an image, `txt` and `json` in a row for each key).
    """
    found: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            for info in archive:
                key, _, extension = info.name.partition(".")
                member = "image" if extension in IMAGE_EXTENSIONS else extension
                members = found.setdefault(key, {})
                payload = archive.extractfile(info) if info.isfile() else None
                if member not in MEMBERS or member in members or payload is None:
                    raise ValueError(f"unexpected member {info.name!r}")
                checksum = zlib.crc32(payload.read())
                members[member] = Member(info.offset_data, info.size, checksum)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"not a readable tar: {error}") from error
    for key, members in found.items():
        if len(members) != len(MEMBERS):
            raise ValueError(f"sample {key!r} has only {sorted(members)}")
    return [IndexRow(key, **members) for key, members in found.items()]

"""The second half of writing a data set: samples of parts -> one shard with its index."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from sdn.data.catalog import Placed
from sdn.data.files import Files
from sdn.data.index import IndexRow, to_parquet
from sdn.data.manifest import Shard
from sdn.data.parts import UNFINISHED, make_span, stem_of

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class ShardOrder:
    """One shard to write; can be sent to another machine."""

    files: Files
    stem: str
    """`{split}-{number}`."""
    image_format: str
    samples: tuple[Placed, ...]


def make_shard(order: ShardOrder) -> Shard:
    """Write a shard and its index, unless an earlier run did.

    Raises:
        ValueError: a part is not what it was when it was made.
    """
    files, name = order.files, f"{order.stem}.tar"
    mark = f"{UNFINISHED}/shards/{order.stem}.json"
    made_from = hashlib.sha256(repr(order.samples).encode()).hexdigest()
    if files.exists(mark) and (found := json.loads(files.read(mark)))["from"] == made_from:
        return Shard(**found["shard"])
    # Digests are taken on the way, so they describe what was meant, not what the disk made of it.
    digest, length = hashlib.sha256(), 0
    rows: list[IndexRow] = []
    with files.writing(name) as out:
        for row, span in _spans(order):
            rows.append(replace(row, offset=length))
            out.write(span)
            digest.update(span)
            length += len(span)
        end = bytes(2 * tarfile.BLOCKSIZE + -(length + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)
        out.write(end)
        digest.update(end)
    index = to_parquet(rows, name)
    shard = Shard(
        name=name,
        bytes=length + len(end),
        sha256=digest.hexdigest(),
        samples=len(rows),
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    files.write(shard.index_name, index)
    files.write(mark, json.dumps({"from": made_from, "shard": asdict(shard)}).encode())
    return shard


def _spans(order: ShardOrder) -> Iterator[tuple[IndexRow, bytes]]:
    for sample in order.samples:
        row = sample.row
        part = f"{stem_of(sample.part)}.spans"
        span = order.files.read_range(part, row.offset, row.length)
        forget = getattr(order.files, "forget", None)
        if forget is not None and zlib.crc32(span) != row.crc32:
            forget(part)  # a copy kept from an earlier run, whose parts had the same names
            span = order.files.read_range(part, row.offset, row.length)
        if zlib.crc32(span) != row.crc32:
            raise ValueError(
                f"{order.files.uri}/{part}: sample {row.key!r} has changed since it was prepared; "
                f"delete {order.files.uri}/{UNFINISHED} and prepare again"
            )
        yield _renamed(sample, span, order.image_format)


def _renamed(sample: Placed, span: bytes, image_format: str) -> tuple[IndexRow, bytes]:
    """The sample under its final key, which stands in its tar headers."""
    row = sample.row
    if sample.name == row.key:
        return row, span
    image = span[row.image_offset : row.image_offset + row.image_length]
    about = span[row.json_offset : row.json_offset + row.json_length]
    txt = json.loads(about)["captions"][0].encode()
    new = make_span(sample.name, image_format, {"image": image, "json": about, "txt": txt})
    return replace(row, key=sample.name, crc32=zlib.crc32(new)), new

"""The first half of writing a data set: partitions of a source -> parts.

A part is what one partition gave, prepared: the spans of its samples one behind the other, their
index with digests, its dead letters; and last of all a mark with its counts. Parts lie in the data
set's folder `unfinished` until the manifest is written, so a run that was cut off goes on from
those that have their mark.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sdn.config import DataConfig
from sdn.data.dead_letters import KeptLetter, keep
from sdn.data.duplicates import content_digest, near_digest, pixels_digest, words_digest
from sdn.data.files import Files
from sdn.data.index import IndexRow, rows_from_parquet, to_parquet
from sdn.data.preparation import Prepared, prepare
from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources import Partition

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

UNFINISHED = "unfinished"
"""Folder of what is not yet part of the data set."""


@dataclass(frozen=True, kw_only=True)
class PartOrder:
    """One partition to prepare; can be sent to another machine."""

    files: Files
    """The data set."""
    config: DataConfig
    number: int
    partition: Partition


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one partition gave."""

    number: int
    samples: int
    dead_letters: int
    exclusions: dict[str, int]
    """Reason -> how many."""

    @property
    def stem(self) -> str:
        """Its files without their endings."""
        return stem_of(self.number)

    @property
    def spans(self) -> str:
        """File of its samples."""
        return f"{self.stem}.spans"


def make_part(order: PartOrder) -> Part:
    """Prepare one partition, unless an earlier run did.

    At most `config.limit` samples are taken from it.
    """
    files = order.files
    mark = f"{stem_of(order.number)}.json"
    if files.exists(mark):
        return Part(**json.loads(files.read(mark)))
    rows: list[tuple[IndexRow, str]] = []
    letters: list[KeptLetter] = []
    excluded: Counter[str] = Counter()
    with files.writing(f"{stem_of(order.number)}.spans") as out:
        for item in order.partition.items():
            outcome = prepare(item, order.config) if isinstance(item, Record) else item
            if isinstance(outcome, Exclusion):
                excluded[outcome.reason] += 1
            elif isinstance(outcome, DeadLetter):
                letters.append(keep(files, outcome))
            else:
                assert isinstance(item, Record)
                rows.append((_append(out, item, outcome, order.config), outcome.split))
                if len(rows) == order.config.limit:
                    break
    part = Part(
        number=order.number,
        samples=len(rows),
        dead_letters=len(letters),
        exclusions=dict(sorted(excluded.items())),
    )
    index = to_parquet([row for row, _ in rows], part.spans, [split for _, split in rows])
    files.write(f"{part.stem}.parquet", index)
    files.write(f"{part.stem}.jsonl", "".join(letter.line() for letter in letters).encode())
    files.write(mark, json.dumps(asdict(part)).encode())
    return part


def rows_of(files: Files, part: Part) -> list[tuple[IndexRow, str]]:
    """The samples of a part, each with its split."""
    return rows_from_parquet(files.read(f"{part.stem}.parquet"), with_split=True)


def letters_of(files: Files, part: Part) -> Iterator[KeptLetter]:
    """The dead letters of a part."""
    for line in files.read(f"{part.stem}.jsonl").splitlines():
        yield KeptLetter(**json.loads(line))


def make_span(key: str, image_format: str, payloads: dict[str, bytes]) -> bytes:
    """The members of one sample as they stand in a tar; owner, mode and time are fixed.

    Args:
        key: name of the members.
        image_format: extension of the image.
        payloads: `image`, `json` and `txt`.
    """
    pieces = []
    for name in ("image", "json", "txt"):
        payload = payloads[name]
        info = tarfile.TarInfo(f"{key}.{image_format if name == 'image' else name}")
        info.size = len(payload)
        info.uname = info.gname = "sdn"
        info.mode = 0o444
        padding = -len(payload) % tarfile.BLOCKSIZE
        pieces += [info.tobuf(tarfile.USTAR_FORMAT), payload, bytes(padding)]
    return b"".join(pieces)


def _append(out: BinaryIO, record: Record, sample: Prepared, config: DataConfig) -> IndexRow:
    payloads = {"image": sample.image, "json": sample.json, "txt": sample.txt}
    offset = out.tell()
    span = make_span(sample.key, config.image_format, payloads)
    out.write(span)
    block = tarfile.BLOCKSIZE
    image_end = block + len(sample.image) + -len(sample.image) % block
    about: dict[str, Any] = json.loads(sample.json)
    return IndexRow(
        key=sample.key,
        offset=offset,
        length=len(span),
        crc32=zlib.crc32(span),
        image_offset=block,
        image_length=len(sample.image),
        json_offset=image_end + block,
        json_length=len(sample.json),
        content=content_digest(record),
        pixels=pixels_digest(sample.pixels),
        near=near_digest(sample.pixels),
        words=words_digest(about["captions"]),
    )


def stem_of(number: int) -> str:
    """Files of a part without their endings."""
    return f"{UNFINISHED}/parts/{number:06d}"

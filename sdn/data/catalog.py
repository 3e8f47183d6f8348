"""What all parts hold together, on disk: which samples stay, in which order, in which shard.

A private temporary SQLite database sorts and joins; memory stays the same for any number of
samples. Samples are ordered by the SHA-256 of their key, so every shard is a random draw and the
result depends neither on the order of the source nor on how it was cut into partitions.
"""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

from sdn.data.index import IndexRow
from sdn.data.records import SPLITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Duplicates = Literal["report", "hold-out", "drop"]
Measure = Literal["pixels", "near", "words"]

_ROW = tuple(f.name for f in fields(IndexRow))
_VALUES = attrgetter(*_ROW)
_PRIORITY = {"test": 0, "validation": 1, "train": 2}
"""Which split keeps an image that two of them have: the one that scores are taken on."""
_NOUN = {"pixels": "image", "near": "look of an image", "words": "caption, word for word,"}
_HELD_OUT_FIRST = (("validation", "test"), ("train", "test"), ("train", "validation"))
"""(split, the split that keeps what both have): scores are taken on what was held out."""
_THERE_FIRST = tuple((a, b) for a in SPLITS for b in SPLITS if a != b)
"""The same for samples that older versions have: their shards are never rewritten."""
_SCHEMA = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
BEGIN;
CREATE TABLE sample (
    id INTEGER PRIMARY KEY, place BLOB, part INTEGER, split TEXT, priority INTEGER,
    left_out TEXT, name TEXT, {", ".join(_ROW)}
);
CREATE TABLE there (key TEXT, split TEXT, content BLOB, pixels BLOB, near BLOB, words BLOB);
"""


@dataclass(frozen=True, slots=True)
class Placed:
    """A sample on its way into a shard."""

    part: int
    name: str
    """Its final key; differs from that of `row` where another sample had that one before."""
    row: IndexRow
    """Where it lies in its part."""


class Catalog:
    """All samples of a run, and what it takes to compare them with those there already."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sdn-catalog-")
        path = f"{self._folder.name}/catalog.sqlite"
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.create_function("with_digest", 2, _with_digest, deterministic=True)
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Delete the database."""
        self._db.close()
        self._folder.cleanup()

    def add_there(self, rows: Iterable[IndexRow], split: str) -> None:
        """Note samples that the version before has."""
        self._db.executemany(
            "INSERT INTO there VALUES (?, ?, ?, ?, ?, ?)",
            ((r.key, split, r.content, r.pixels, r.near, r.words) for r in rows),
        )

    def add(self, part: int, rows: Iterable[tuple[IndexRow, str]]) -> None:
        """Note the samples of a part."""
        marks = ", ".join("?" * (5 + len(_ROW)))
        columns = f"place, part, split, priority, name, {', '.join(_ROW)}"
        self._db.executemany(
            f"INSERT INTO sample ({columns}) VALUES ({marks})",
            (
                (_place(row), part, split, _PRIORITY[split], row.key, *_VALUES(row))
                for row, split in rows
            ),
        )

    def keep_keys_unique(self) -> None:
        """Leave out what is there already, and give a key to each other record of the same key.

        A record with the same key and content as another is the same one. One with other content
        gets the beginning of its content's digest behind its key: nothing is lost.
        """
        for column in ("key", "content"):
            self._db.execute(f"CREATE INDEX there_{column} ON there ({column})")
            self._db.execute(f"CREATE INDEX sample_{column} ON sample ({column}, place, part)")
        self._leave_out("it is there already", "content IN (SELECT content FROM there)")
        self._leave_out(
            "the same record came before",
            "EXISTS (SELECT 1 FROM sample AS o WHERE o.key = sample.key"
            " AND o.content = sample.content AND o.left_out IS NULL AND o.id < sample.id)",
        )
        taken = (
            "key IN (SELECT key FROM there) OR EXISTS (SELECT 1 FROM sample AS o"
            " WHERE o.key = sample.key AND o.left_out IS NULL"
            " AND (o.place, o.id) < (sample.place, sample.id))"
        )
        self._db.execute(
            "UPDATE sample SET name = with_digest(key, content)"
            f" WHERE left_out IS NULL AND ({taken})"
        )

    def cut(self, limit: int) -> None:
        """Keep the first `limit` samples, as their places order them."""
        self._leave_out(
            None,
            "id NOT IN (SELECT id FROM sample WHERE left_out IS NULL ORDER BY id LIMIT ?)",
            limit,
        )

    def count_duplicates(self) -> dict[str, int]:
        """How many samples repeat another, by measure and by the splits of both.

        "pixels, in train": images of the training split that an earlier one of it equals.
        "pixels, in test and train": images of the test split that are in training, too.
        """
        found = {}
        for measure in ("pixels", "near", "words"):
            self._gather(measure)
            for split in SPLITS:
                found[f"{measure}, in {split}"] = self._number(
                    "SELECT SUM(n - 1) FROM same WHERE split = ?", split
                )
            for held, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
                found[f"{measure}, in {held} and {other}"] = self._number(
                    "SELECT SUM(a.n) FROM same AS a JOIN same AS b ON a.digest = b.digest"
                    " WHERE a.split = ? AND b.split = ?",
                    held,
                    other,
                )
        return {name: count for name, count in found.items() if count}

    def leave_out_duplicates(self, mode: Duplicates, loosest: Measure) -> None:
        """Apply `DataConfig.duplicates` and `DataConfig.same`; what is there already stays."""
        measures: tuple[Measure, ...] = ("pixels",)
        if loosest != "pixels":
            measures = ("pixels", loosest)
        for measure in measures if mode != "report" else ():
            self._db.execute(f"CREATE INDEX by_{measure} ON sample ({measure}, priority, place)")
            self._db.execute(f"CREATE INDEX there_by_{measure} ON there ({measure}, split)")
            noun = f"the same {_NOUN[measure]} is in the"
            for split, keeper in _THERE_FIRST:
                self._leave_out(
                    f"{noun} {keeper} split",
                    "split = ? AND EXISTS (SELECT 1 FROM there AS o"
                    f" WHERE o.{measure} = sample.{measure} AND o.split = ?)",
                    split,
                    keeper,
                )
            for split, keeper in _HELD_OUT_FIRST:
                self._leave_out(
                    f"{noun} {keeper} split",
                    f"split = ? AND EXISTS (SELECT 1 FROM sample AS o WHERE o.{measure} ="
                    f" sample.{measure} AND o.split = ? AND o.left_out IS NULL)",
                    split,
                    keeper,
                )
            if mode == "drop":
                self._leave_out(
                    f"the same {_NOUN[measure]} came before in its split",
                    f"EXISTS (SELECT 1 FROM there AS o WHERE o.{measure} = sample.{measure}"
                    " AND o.split = sample.split) OR EXISTS (SELECT 1 FROM sample AS o"
                    f" WHERE o.{measure} = sample.{measure} AND o.split = sample.split"
                    " AND o.left_out IS NULL AND (o.place, o.id) < (sample.place, sample.id))",
                )

    def exclusions(self) -> dict[str, int]:
        """Reason -> how many samples were left out for it."""
        return dict(
            self._db.execute(
                "SELECT left_out, COUNT(*) FROM sample WHERE left_out <> ''"
                " GROUP BY left_out ORDER BY left_out"
            )
        )

    def samples(self) -> dict[str, int]:
        """Split -> samples that stay."""
        counts = dict(
            self._db.execute(
                "SELECT split, COUNT(*) FROM sample WHERE left_out IS NULL GROUP BY split"
            )
        )
        return {split: counts.get(split, 0) for split in SPLITS}

    def keys(self) -> Iterator[str]:
        """Keys, as the source gave them, of the samples that stay."""
        query = "SELECT key FROM sample WHERE left_out IS NULL"
        return (key for (key,) in self._db.execute(query))

    def in_shards(self, split: str, size: int) -> Iterator[tuple[Placed, ...]]:
        """The samples of a split that stay, in their order, `size` at a time."""
        query = (
            f"SELECT part, name, {', '.join(_ROW)} FROM sample"
            " WHERE left_out IS NULL AND split = ? ORDER BY place, id"
        )
        rows = self._db.execute(query, (split,))
        while chunk := rows.fetchmany(size):
            yield tuple(Placed(part, name, IndexRow(*values)) for part, name, *values in chunk)

    def _leave_out(self, reason: str | None, condition: str, *values: object) -> None:
        """Mark what the condition finds; reason None is no exclusion, only beyond the limit."""
        self._db.execute(
            f"UPDATE sample SET left_out = ? WHERE left_out IS NULL AND ({condition})",
            (reason or "", *values),
        )

    def _gather(self, measure: str) -> None:
        """Table `same`: how often each split has each digest, old samples and new."""
        self._db.executescript(
            "DROP TABLE IF EXISTS same;"
            f"CREATE TABLE same AS SELECT digest, split, COUNT(*) AS n FROM"
            f" (SELECT {measure} AS digest, split FROM sample WHERE left_out IS NULL UNION ALL"
            f" SELECT {measure}, split FROM there) GROUP BY digest, split;"
            "CREATE INDEX same_digest ON same (digest, split);"
        )

    def _number(self, query: str, *values: object) -> int:
        return int(self._db.execute(query, values).fetchone()[0] or 0)


def _place(row: IndexRow) -> bytes:
    """Where a sample comes in the order of its split."""
    return hashlib.sha256(row.key.encode()).digest()


def _with_digest(key: str, content: bytes) -> str:
    """A key of its own for a record whose key another one has."""
    # Keys have at most 90 bytes; a character cut in two is left out.
    return f"{key.encode()[:80].decode(errors='ignore')}-{content.hex()[:8]}"

"""What came between two data sets, or two versions of one."""

from __future__ import annotations

import sqlite3
import tempfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdn.config.parsing import CAME_LATER
from sdn.data.index import rows_from_parquet
from sdn.data.records import SPLITS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from sdn.data.dataset import DataSet
    from sdn.data.manifest import Manifest

_SHOWN = 20
_KINDS = {
    "came": (
        "SELECT key, split FROM new WHERE NOT EXISTS"
        " (SELECT 1 FROM old WHERE old.key = new.key) ORDER BY split, key"
    ),
    "gone": (
        "SELECT key, split FROM old WHERE NOT EXISTS"
        " (SELECT 1 FROM new WHERE old.key = new.key) ORDER BY split, key"
    ),
    "changed": (
        "SELECT new.key, new.split FROM new JOIN old USING (key)"
        " WHERE new.content <> old.content OR new.split <> old.split ORDER BY new.split, new.key"
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What a later data set has that an earlier one lacks, and the other way round."""

    counts: dict[str, dict[str, int]]
    """"came", "gone" or "changed" -> split -> samples."""
    keys: dict[str, list[str]]
    """The same kinds -> the first keys of each."""
    shards: dict[str, tuple[int, int]]
    """Split -> shards before and after."""
    dead_letters: tuple[int, int]
    """Before and after."""
    preparation: dict[str, tuple[Any, Any]]
    """Parameter of the preparation that differs -> before and after."""


def difference(old: DataSet, new: DataSet) -> Difference:
    """Compare two data sets, sample by sample, by key and content.

    Raises:
        ValueError: an index is missing or damaged.
    """
    with tempfile.TemporaryDirectory(prefix="sdn-diff-") as folder:
        db = sqlite3.connect(f"{folder}/diff.sqlite", isolation_level=None)
        db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN;")
        for name, dataset in (("old", old), ("new", new)):
            db.execute(f"CREATE TABLE {name} (key TEXT PRIMARY KEY, split TEXT, content BLOB)")
            insert = f"INSERT OR REPLACE INTO {name} VALUES (?, ?, ?)"  # noqa: S608 (old or new)
            db.executemany(insert, _rows(dataset))
        found = {kind: _sorted_out(db, query) for kind, query in _KINDS.items()}
        db.close()
    before, after = (CAME_LATER | one.manifest.preparation for one in (old, new))
    return Difference(
        counts={kind: counts for kind, (counts, _) in found.items()},
        keys={kind: keys for kind, (_, keys) in found.items()},
        shards={split: (len(old.shards(split)), len(new.shards(split))) for split in SPLITS},
        dead_letters=(old.manifest.dead_letters, new.manifest.dead_letters),
        preparation={
            name: (before.get(name), after.get(name))
            for name in sorted(set(before) | set(after))
            if before.get(name) != after.get(name)
        },
    )


def _rows(dataset: DataSet) -> Iterator[tuple[str, str, bytes]]:
    for split in SPLITS:
        for shard in dataset.shards(split):
            for row, _ in rows_from_parquet(dataset.files.read(shard.index_name)):
                yield row.key, split, row.content


def _sorted_out(db: sqlite3.Connection, query: str) -> tuple[dict[str, int], list[str]]:
    counts = dict.fromkeys(SPLITS, 0)
    keys: list[str] = []
    for key, split in db.execute(query):
        counts[split] += 1
        if len(keys) < _SHOWN:
            keys.append(key)
    return counts, keys


def came_since(old: Manifest, new: Manifest) -> Manifest | None:
    """What a later version has beyond an earlier one, as a manifest that is never written.

    Returns:
        None where `new` is no later version of the data set that `old` is a version of.
    """
    count = len(old.segments)
    same = [segment.digest for segment in old.segments]
    if [segment.digest for segment in new.segments[:count]] != same or new.number < old.number:
        return None
    return replace(new, segments=new.segments[count:])

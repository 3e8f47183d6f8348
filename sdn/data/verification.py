"""The check of a whole data set, down to each byte and each image."""

from __future__ import annotations

import re
import sqlite3
import tempfile
from typing import TYPE_CHECKING

from sdn.data.dataset import DataSet
from sdn.data.dead_letters import read_list
from sdn.data.manifest import MANIFEST, FileRef, read_manifest, version_file
from sdn.data.reading import DamagedSample, ShardReader
from sdn.data.records import SPLITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdn.data.files import Files
    from sdn.data.manifest import Manifest, Shard

_SHARD = re.compile(rf"({'|'.join(SPLITS)})-(\d+)\.(tar|parquet)")


def verify(
    files: Files,
    version: str | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Every damage found in a data set, in words; an empty list where there is none.

    Checked are the manifest and those of all versions before, the length and SHA-256 of each shard
    and index, the checksum and the image of each sample, that no key comes twice, the lists of dead
    letters and their originals, and that there is no shard that no version names.

    Args:
        files: the data set.
        version: beginning of the digest of one version; None takes the newest and looks for
            shards that belong to none.
        report: called with (shards checked, of how many) after each shard.
    """
    try:
        manifest = read_manifest(files, version)
        dataset = DataSet(files, manifest)
        tables = {split: dataset.shards(split) for split in SPLITS}
    except ValueError as error:
        return [str(error)]
    damages = _versions(files, manifest) + _dead_letters(files, manifest)
    if version is None:
        damages += _strangers(files, manifest)
    total, done = sum(map(len, tables.values())), 0
    with tempfile.TemporaryDirectory(prefix="sdn-verify-") as folder:
        keys = _Keys(f"{folder}/keys.sqlite")
        for split in SPLITS:
            reader = ShardReader(dataset, split, cache_gib=0)
            for number, shard in enumerate(tables[split]):
                found = _shard_files(files, shard)
                damages += found + _samples(reader, number, keys, explained=bool(found))
                done += 1
                report(done, total)
            reader.close()
        damages += keys.repeated()
        keys.close()
    return damages


class _Keys:
    """All keys seen, on disk: memory must not grow with the data."""

    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN;"
            "CREATE TABLE seen (key TEXT PRIMARY KEY, n INTEGER) WITHOUT ROWID"
        )

    def add(self, keys: Iterator[str]) -> None:
        self._db.executemany(
            "INSERT INTO seen VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET n = n + 1",
            ((key,) for key in keys),
        )

    def repeated(self) -> list[str]:
        found = self._db.execute("SELECT key, n FROM seen WHERE n > 1 ORDER BY key")
        return [f"key {key!r}: {n} samples have it" for key, n in found]

    def close(self) -> None:
        self._db.close()


def _versions(files: Files, manifest: Manifest) -> list[str]:
    """The manifests of this version and of all before it."""
    damages = []
    newest: Manifest | None = manifest
    while newest is not None:
        name = version_file(newest)
        try:
            kept = read_manifest(files, newest.digest)
            parent = None if kept.parent is None else read_manifest(files, kept.parent)
        except ValueError as error:
            damages.append(f"{name}: {error}")
            break
        if kept != newest:
            damages.append(f"{name}: differs from {MANIFEST}")
        newest = parent
    return damages


def _strangers(files: Files, manifest: Manifest) -> list[str]:
    """Shards and tables that the newest version does not name; it names those of all others."""
    counts = dict.fromkeys(SPLITS, 0)
    for segment in manifest.segments:
        counts[segment.split] += segment.shards
    tables = {segment.table.name for segment in manifest.segments if segment.table}
    damages = []
    for info in files.walk():
        if "/" in info.name or not info.name.endswith((".tar", ".parquet")):
            continue
        match = _SHARD.fullmatch(info.name)
        known = match is not None and int(match[2]) < counts[match[1]]
        if not known and info.name not in tables:
            damages.append(f"{info.name}: not named in the manifest")
    return sorted(damages)


def _dead_letters(files: Files, manifest: Manifest) -> list[str]:
    listed = manifest.dead_letter_file
    damages = _file(files, listed)
    if damages:
        return damages
    for letter in read_list(files, listed):
        if letter.original is not None and not files.exists(letter.original):
            damages.append(f"{letter.original}: missing; the original of dead letter {letter.key}")
    return damages


def _shard_files(files: Files, shard: Shard) -> list[str]:
    """Length and SHA-256 of a shard and of its index."""
    return [
        *_file(files, FileRef(name=shard.name, bytes=shard.bytes, sha256=shard.sha256)),
        *_file(
            files,
            FileRef(name=shard.index_name, bytes=shard.index_bytes, sha256=shard.index_sha256),
        ),
    ]


def _file(files: Files, expected: FileRef) -> list[str]:
    try:
        length = files.size(expected.name)
        if length != expected.bytes:
            return [f"{expected.name}: has {length} bytes, expected {expected.bytes}"]
        found = files.sha256(expected.name)
    except FileNotFoundError:
        return [f"{expected.name}: missing"]
    except OSError as error:
        return [f"{expected.name}: cannot be read: {error}"]
    if found != expected.sha256:
        return [f"{expected.name}: has SHA-256 {found}, expected {expected.sha256}"]
    return []


def _samples(reader: ShardReader, number: int, keys: _Keys, *, explained: bool) -> list[str]:
    """Each sample of a shard, read in the way that training reads it."""
    try:
        index = reader.index(number)
    except DamagedSample as error:
        return [] if explained else [str(error)]
    keys.add(iter(index.keys))
    damages = []
    for row in range(len(index)):
        try:
            reader.read(number, row)
        except DamagedSample as error:
            damages.append(str(error))
    return damages

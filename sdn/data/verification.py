"""The check of a whole data set, down to each byte and each image."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sdn.data.files import LocalFolder
from sdn.data.manifest import DEAD_LETTERS, Manifest, Shard, read_manifest
from sdn.data.reading import DamagedSample, ShardReader

if TYPE_CHECKING:
    from pathlib import Path


def verify(folder: Path | str) -> list[str]:
    """Every damage found in the data set, in words; an empty list where there is none.

    Checked are the manifest, the length and SHA-256 of each shard and index, the checksums and
    the image of each sample, that no key comes twice, that the dead letters are all listed, and
    that no shard lies in the folder that the manifest does not name.
    """
    files = LocalFolder(folder)
    try:
        manifest = read_manifest(files)
    except ValueError as error:
        return [str(error)]
    damages = _strangers(files, manifest) + _dead_letters(files, manifest)
    keys: Counter[str] = Counter()
    for split in manifest.splits:
        reader = ShardReader(folder, manifest, split, cache_gib=0)
        for number, shard in enumerate(reader.shards):
            found = _files(files, shard)
            damages += found + _samples(reader, number, keys, explained=bool(found))
        reader.close()
    return damages + [f"key {key!r}: {n} samples have it" for key, n in keys.items() if n > 1]


def _strangers(files: LocalFolder, manifest: Manifest) -> list[str]:
    shards = [shard for split in manifest.splits for shard in manifest.shards(split)]
    known = {name for shard in shards for name in (shard.name, shard.index_name)}
    found = [name for name in files.names() if name.endswith((".tar", ".parquet"))]
    return [f"{name}: not named in the manifest" for name in found if name not in known]


def _dead_letters(files: LocalFolder, manifest: Manifest) -> list[str]:
    lines = files.read(DEAD_LETTERS).count(b"\n") if files.exists(DEAD_LETTERS) else 0
    if lines == manifest.dead_letters:
        return []
    return [f"{DEAD_LETTERS}: lists {lines} dead letters, expected {manifest.dead_letters}"]


def _files(files: LocalFolder, shard: Shard) -> list[str]:
    """Length and SHA-256 of a shard and of its index."""
    damages = []
    for name, length, sha256 in (
        (shard.name, shard.bytes, shard.sha256),
        (shard.index_name, shard.index_bytes, shard.index_sha256),
    ):
        if not files.exists(name):
            damages.append(f"{name}: missing")
        elif files.size(name) != length:
            damages.append(f"{name}: has {files.size(name)} bytes, expected {length}")
        elif (found := files.sha256(name)) != sha256:
            damages.append(f"{name}: has SHA-256 {found}, expected {sha256}")
    return damages


def _samples(reader: ShardReader, number: int, keys: Counter[str], *, explained: bool) -> list[str]:
    """Each sample of a shard, read in the way that training reads it."""
    try:
        rows = reader.index(number)
    except DamagedSample as error:
        return [] if explained else [str(error)]
    keys.update(row.key for row in rows)
    damages = []
    for row in range(len(rows)):
        try:
            reader.read(number, row)
        except DamagedSample as error:
            damages.append(str(error))
    return damages

"""Records -> plain WebDataset tars with an index each, and a manifest.

The samples of a split are ordered by the SHA-256 of their key, so every shard is a random draw and
the bytes do not depend on the order of the source. That keeps all prepared samples in memory until
the source has ended: fine for collections of some 100,000 small images.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sdn.config import to_dict
from sdn.data.files import LocalFolder
from sdn.data.index import scan, to_parquet
from sdn.data.manifest import DEAD_LETTERS, MANIFEST, Manifest, Shard, write_manifest
from sdn.data.preparation import Prepared, prepare
from sdn.data.records import SPLITS, DeadLetter, Exclusion, SourceItem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from sdn.config import DataConfig

UNFINISHED = "unfinished"
"""Lies in a folder from the first write until after the manifest: its files may be replaced."""

_OURS = re.compile(rf"({'|'.join(SPLITS)})-\d+\.(tar|parquet)")


def write_dataset(
    items: Iterable[SourceItem],
    out: Path,
    config: DataConfig,
    *,
    attribution: str | None,
    report: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Prepare every record and write the data set; the same input gives the same bytes.

    Files: `{split}-{number}.tar` with the members `key.png` or `key.jpg`, `key.txt` (the first
    caption) and `key.json` (`{"captions": [...], "labels": {...}}`), a `.parquet` index beside each
    tar, `dead-letters.jsonl`, and at the very end `manifest.json`.

    Args:
        items: records, exclusions and dead letters of a source; read up to `config.limit` records.
        out: folder; made where there is none. A folder with a manifest is finished and never
            written again; what a cut-off preparation left is replaced.
        config: how images are prepared, samples a shard, the failure budget.
        attribution: whom to name beside images that come from this data.
        report: called with the number of records read so far, after each.

    Raises:
        ValueError: the folder cannot be used, no records, none to train on, or more dead letters
            than `config.failure_budget` allows. No manifest is written then.
        ImportError: webdataset or pyarrow is not installed.
    """
    _require_writers()
    files = LocalFolder(out)
    _claim(files)
    collected = _collect(items, config, report)
    lines = [json.dumps(to_dict(d)) + "\n" for d in collected.dead_letters]
    files.write(DEAD_LETTERS, "".join(lines).encode())
    _check(collected, config, files)
    splits = {
        split: _write_split(files, split, samples, config)
        for split, samples in collected.samples.items()
    }
    manifest = Manifest(
        preparation=_preparation(config),
        splits=splits,
        exclusions=dict(sorted(collected.exclusions.items())),
        dead_letters=len(collected.dead_letters),
        attribution=attribution,
    )
    write_manifest(files, manifest)
    files.remove(UNFINISHED)
    return manifest


@dataclass
class _Collected:
    """A source, read to its end."""

    samples: dict[str, list[Prepared]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    dead_letters: list[DeadLetter] = field(default_factory=list)
    exclusions: Counter[str] = field(default_factory=Counter)


def _collect(
    items: Iterable[SourceItem], config: DataConfig, report: Callable[[int], None]
) -> _Collected:
    collected = _Collected()
    keys: set[str] = set()
    records = 0
    for item in items:
        if isinstance(item, Exclusion):
            collected.exclusions[item.reason] += 1
        elif isinstance(item, DeadLetter):
            collected.dead_letters.append(item)
        else:
            records += 1
            outcome = prepare(item, config)
            if item.key in keys:
                reason = "another record came before with the same key"
                outcome = DeadLetter(key=item.key, where=config.source, reason=reason)
            keys.add(item.key)
            if isinstance(outcome, DeadLetter):
                collected.dead_letters.append(outcome)
            else:
                collected.samples[outcome.split].append(outcome)
            report(records)
            if records == config.limit:
                break
    return collected


def _check(collected: _Collected, config: DataConfig, files: LocalFolder) -> None:
    """Refuse a source that gave too little or failed too often."""
    dead = collected.dead_letters
    total = len(dead) + sum(map(len, collected.samples.values()))
    if total == 0:
        excluded = collected.exclusions.total()
        raise ValueError(f"the source {config.source!r} gave no record ({excluded} exclusions)")
    if len(dead) > config.failure_budget * total:
        first = "\n".join(f"  {d.key} ({d.where}): {d.reason}" for d in dead[:5])
        raise ValueError(
            f"{len(dead)} of {total} records ({len(dead) / total:.1%}) cannot be used, more than "
            f"data.failure_budget allows ({config.failure_budget:.1%}). The first of them:\n"
            f"{first}\nAll are listed in {files.path / DEAD_LETTERS}. Mend the source, or raise "
            "data.failure_budget to go on without them."
        )
    if not collected.samples["train"]:
        counts = {split: len(samples) for split, samples in collected.samples.items()}
        raise ValueError(f"nothing to train on: the records of each split are {counts}")


def _write_split(
    files: LocalFolder, split: str, samples: list[Prepared], config: DataConfig
) -> tuple[Shard, ...]:
    ordered = sorted(samples, key=lambda s: hashlib.sha256(s.key.encode()).digest())
    size = config.shard_samples
    return tuple(
        _write_shard(files, f"{split}-{number:05d}", ordered[first : first + size], config)
        for number, first in enumerate(range(0, len(ordered), size))
    )


def _write_shard(
    files: LocalFolder, stem: str, samples: list[Prepared], config: DataConfig
) -> Shard:
    # Digests are taken in memory, so they describe what was meant, not what the disk made of it.
    tar = _pack(samples, config.image_format)
    index = to_parquet(scan(io.BytesIO(tar)))
    shard = Shard(
        name=f"{stem}.tar",
        bytes=len(tar),
        sha256=hashlib.sha256(tar).hexdigest(),
        samples=len(samples),
        index_name=f"{stem}.parquet",
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    files.write(shard.name, tar)
    files.write(shard.index_name, index)
    return shard


def _pack(samples: list[Prepared], image_format: str) -> bytes:
    """The tar of these samples; owner, mode and time are fixed."""
    from webdataset import TarWriter  # type: ignore[import-untyped]

    buffer = io.BytesIO()
    with TarWriter(buffer, user="sdn", group="sdn", encoder=False, mtime=0) as writer:
        for s in samples:
            payloads = {image_format: s.image, "txt": s.txt, "json": s.json}
            writer.write({"__key__": s.key, **payloads})
    return buffer.getvalue()


def _preparation(config: DataConfig) -> dict[str, Any]:
    """What the bytes of the samples depend on; the folder of the source is not part of it."""
    values = to_dict(config)
    return {name: values[name] for name in sorted(values) if name not in ("path", "failure_budget")}


def _require_writers() -> None:
    missing = [name for name in ("webdataset", "pyarrow") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"preparing a data set needs {' and '.join(missing)}; "
            "install with: pip install 'sdn[pipeline]'"
        )


def _claim(files: LocalFolder) -> None:
    """Make the folder ready to be written, and touch nothing that is finished or foreign."""
    if files.exists(MANIFEST):
        raise ValueError(
            f"{files.path} already holds a finished data set, which is never rewritten; "
            "choose another folder, or delete this one first"
        )
    files.prepare()
    left = [name for name in files.names() if _OURS.fullmatch(name)]
    if left and not files.exists(UNFINISHED):
        raise ValueError(
            f"{files.path} holds {left[0]} without a {MANIFEST}, and no preparation that was cut "
            "off has left it there; choose an empty folder"
        )
    files.write(UNFINISHED, b"This folder is no data set yet: its preparation has not finished.\n")
    for name in left:
        files.remove(name)

"""Records -> plain WebDataset tars with an index each, and a manifest.

Two halves, each of independent tasks that may run anywhere: partitions of the source become parts
(`sdn.data.parts`), and, once it is known what all of them hold (`sdn.data.catalog`), the samples of
the parts become shards (`sdn.data.packing`). The manifest comes last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sdn.config import to_key
from sdn.config.parsing import CAME_LATER
from sdn.data.catalog import Catalog
from sdn.data.claims import claim, clear
from sdn.data.dead_letters import KeptLetter, TooManyDeadLetters, read_list, write_list
from sdn.data.index import rows_from_parquet
from sdn.data.manifest import (
    MANIFEST,
    Manifest,
    Segment,
    Shard,
    ShardTable,
    make_segment,
    read_manifest,
    write_manifest,
)
from sdn.data.packing import ShardOrder, make_shard
from sdn.data.parts import Part, PartOrder, letters_of, make_part, rows_of
from sdn.data.records import SPLITS

if TYPE_CHECKING:
    from sdn.config import DataConfig
    from sdn.data.files import Files
    from sdn.data.sources import Partition

T = TypeVar("T")
R = TypeVar("R")

NOT_IN_THE_BYTES = ("path", "failure_budget", "max_pixels")
"""Fields of the config that no byte of a sample depends on."""
SHOWN_LETTERS = 100
"""Dead letters that an error carries for a table."""


class Runner(Protocol):
    """Runs a function over orders, in this process or on other machines; results in any order."""

    def __call__(self, work: Callable[[T], R], orders: Iterable[T], /) -> Iterator[R]:
        """Yield the result of each order; take no more orders ahead than can be worked on."""


def run_here(work: Callable[[T], R], orders: Iterable[T], /) -> Iterator[R]:
    """One after the other, in this process."""
    return map(work, orders)


def _unheard(step: str, done: int, total: int | None) -> None:
    """For those who do not want to know."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a data set is written."""

    config: DataConfig
    attribution: str | None = None
    """Whom to name beside images that come from this data."""
    fingerprint: str | None = None
    """Of the source as it is now: work that was cut off is gone on with only if it is the same;
    None begins anew."""
    budget: bool = True
    """Whether more dead letters than `config.failure_budget` are an error."""
    spared: int = 0
    """So many dead letters are no error whatever share of the records they are: where few records
    come at a time, a single one is a large share."""
    run: Runner = run_here
    report: Callable[[str, int, int | None], None] = _unheard
    """Called with ("read" | "written", how many records or shards, of how many if known)."""


def write_dataset(partitions: Iterable[Partition], files: Files, writing: Writing) -> Manifest:
    """Prepare every record and write the data set; the same input gives the same bytes.

    Files: `{split}-{number}.tar` with the members `key.png` or `key.jpg`, `key.json`
    (`{"captions": [...], "labels": {...}}`) and `key.txt` (the first caption), a `.parquet` index
    beside each tar, `dead-letters/`, `versions/`, and at the very end `manifest.json`.

    Args:
        partitions: the source in pieces.
        files: an empty place, or one where the same preparation was cut off, which then goes on.
        writing: how.

    Raises:
        ValueError: the place cannot be used, no records, or none to train on. No manifest is
            written then.
        TooManyDeadLetters: more than `config.failure_budget` allows.
        ImportError: pyarrow is not installed.
    """
    _require_writer()
    if files.exists(MANIFEST):
        raise ValueError(
            f"{files.uri} already holds a finished data set, which is never rewritten; append to "
            "it, choose another place, or delete this one first"
        )
    manifest = _write(partitions, files, writing, None)
    assert manifest is not None
    return manifest


def append_dataset(
    partitions: Iterable[Partition], files: Files, writing: Writing
) -> Manifest | None:
    """Add the records that are not there yet as new shards and a new version.

    Args:
        partitions: the source in pieces; what is there already may be among it.
        files: a finished data set, prepared with the same config.
        writing: how.

    Returns:
        The new version; None where nothing was new.

    Raises:
        ValueError: no data set there, or one that was prepared in another way.
        TooManyDeadLetters, ImportError: as `write_dataset`; the version before stays.
    """
    _require_writer()
    parent = read_manifest(files)
    _refuse_other_preparation(parent, writing.config, files)
    return _write(partitions, files, writing, parent)


def preparation(config: DataConfig) -> dict[str, Any]:
    """What the bytes of the samples depend on; the place of the source is not part of it."""
    values = to_key(config)
    return {name: values[name] for name in sorted(values) if name not in NOT_IN_THE_BYTES}


def _write(
    partitions: Iterable[Partition], files: Files, writing: Writing, parent: Manifest | None
) -> Manifest | None:
    config = writing.config
    files.prepare()
    made_from = {
        "preparation": preparation(config),
        "max_pixels": config.max_pixels,
        "source": writing.fingerprint,
        "parent": parent.digest if parent else None,
    }
    claim(files, made_from, parent)
    parts = _make_parts(partitions, files, writing)
    number = parent.number + 1 if parent else 1
    if writing.budget:
        _check_budget(files, parts, config, number, writing.spared)
    catalog = Catalog()
    try:
        duplicates = _fill(catalog, files, parts, config, parent)
        _check_training(catalog, parent)
        letters = _letters(catalog, files, parts, parent)
        segments = _make_shards(catalog, files, writing, parent)
        excluded = Counter(catalog.exclusions())
    finally:
        catalog.close()
    if parent is not None and not segments and _unchanged(letters, files, parent):
        clear(files, parent)
        return None
    for part in parts:
        excluded.update(part.exclusions)
    manifest = Manifest(
        number=number,
        parent=parent.digest if parent else None,
        preparation=preparation(config),
        segments=(*(parent.segments if parent else ()), *segments),
        exclusions=dict(sorted(excluded.items())),
        duplicates=duplicates,
        dead_letters=len(letters),
        dead_letter_file=write_list(files, number, letters),
        attribution=writing.attribution,
        origin=config.path,
    )
    write_manifest(files, manifest)
    clear(files, manifest)
    return manifest


def _make_parts(partitions: Iterable[Partition], files: Files, writing: Writing) -> list[Part]:
    """The parts in order; with a limit, those that it takes to reach it."""
    limit = writing.config.limit
    made: dict[int, Part] = {}
    begun = _Begun()

    def orders() -> Iterator[PartOrder]:
        for number, partition in enumerate(partitions):
            if limit is not None and begun.samples(made) >= limit:
                return
            yield PartOrder(files=files, config=writing.config, number=number, partition=partition)

    records = 0
    for part in writing.run(make_part, orders()):
        made[part.number] = part
        records += part.samples + part.dead_letters
        writing.report("read", records, None)
    parts, samples = [], 0
    for number in sorted(made):
        if limit is not None and samples >= limit:
            break
        parts.append(made[number])
        samples += made[number].samples
    return parts


class _Begun:
    """Counts the samples of the parts from the first on, up to the first that is not made yet."""

    def __init__(self) -> None:
        self._next = self._samples = 0

    def samples(self, made: dict[int, Part]) -> int:
        while self._next in made:
            self._samples += made[self._next].samples
            self._next += 1
        return self._samples


def _fill(
    catalog: Catalog,
    files: Files,
    parts: list[Part],
    config: DataConfig,
    parent: Manifest | None,
) -> dict[str, int]:
    """Bring all samples into the catalog and decide which of them stay; what was found twice."""
    for part in parts:
        catalog.add(part.number, rows_of(files, part))
    for split in SPLITS if parent else ():
        assert parent is not None
        for shard in ShardTable(files, parent, split):
            rows = rows_from_parquet(files.read(shard.index_name))
            catalog.add_there((row for row, _ in rows), split)
    catalog.keep_keys_unique()
    if config.limit is not None:
        catalog.cut(config.limit)
    duplicates = catalog.count_duplicates()
    catalog.leave_out_duplicates(config.duplicates, config.same)
    return duplicates


def _make_shards(
    catalog: Catalog, files: Files, writing: Writing, parent: Manifest | None
) -> list[Segment]:
    config = writing.config
    size = config.shard_samples
    total = sum(-(-samples // size) for samples in catalog.samples().values())
    written = 0
    segments = []
    for split in SPLITS:
        first = sum(s.shards for s in parent.segments if s.split == split) if parent else 0
        orders = (
            ShardOrder(
                files=files,
                stem=f"{split}-{number:05d}",
                image_format=config.image_format,
                samples=samples,
            )
            for number, samples in enumerate(catalog.in_shards(split, size), start=first)
        )
        shards: list[Shard] = []
        for shard in writing.run(make_shard, orders):
            shards.append(shard)
            written += 1
            writing.report("written", written, total)
        # Sorted by number: names of more than five digits sort behind shorter ones.
        shards.sort(key=lambda shard: (len(shard.name), shard.name))
        if shards:
            segments.append(make_segment(files, split, shards, len(shards)))
    return segments


def _letters(
    catalog: Catalog, files: Files, parts: list[Part], parent: Manifest | None
) -> list[KeptLetter]:
    """The dead letters of the new version: those of this run, and older ones not mended by it."""
    new = [x for part in parts for x in letters_of(files, part)]
    old = list(read_list(files, parent.dead_letter_file)) if parent else []
    mended = {x.key for x in old}.intersection(catalog.keys())
    found = {(x.key, x.where): x for x in [*old, *new] if x.key not in mended}
    return [found[place] for place in sorted(found)]


def _unchanged(letters: list[KeptLetter], files: Files, parent: Manifest) -> bool:
    return letters == list(read_list(files, parent.dead_letter_file))


def _check_budget(
    files: Files, parts: list[Part], config: DataConfig, number: int, spared: int
) -> None:
    """Refuse a source that gave nothing or failed too often."""
    dead = sum(part.dead_letters for part in parts)
    total = dead + sum(part.samples for part in parts)
    if total == 0 and number == 1:
        excluded = sum(sum(part.exclusions.values()) for part in parts)
        raise ValueError(f"the source {config.source!r} gave no record ({excluded} exclusions)")
    if dead <= max(spared, config.failure_budget * total):
        return
    letters = (letter for part in parts for letter in letters_of(files, part))
    listed = write_list(files, number, letters)
    shown = list(_beginning(files, parts))
    first = "\n".join(f"  {x.key} ({x.where}): {x.reason}" for x in shown[:5])
    raise TooManyDeadLetters(
        f"{dead} of {total} records ({dead / total:.1%}) cannot be used, more than "
        f"data.failure_budget allows ({config.failure_budget:.1%}). The first of them:\n{first}\n"
        f"All are listed in {files.uri}/{listed.name}. Mend the source, or raise "
        "data.failure_budget to go on without them.",
        shown,
    )


def _beginning(files: Files, parts: list[Part]) -> Iterator[KeptLetter]:
    letters = (letter for part in parts for letter in letters_of(files, part))
    return islice(letters, SHOWN_LETTERS)


def _check_training(catalog: Catalog, parent: Manifest | None) -> None:
    counts = catalog.samples()
    if not counts["train"] and parent is None:
        raise ValueError(f"nothing to train on: the records of each split are {counts}")


def _refuse_other_preparation(parent: Manifest, config: DataConfig, files: Files) -> None:
    was, now = CAME_LATER | parent.preparation, CAME_LATER | preparation(config)
    other = [
        f"{name} was {was.get(name)!r} and now is {now.get(name)!r}"
        for name in sorted(set(was) | set(now))
        if name not in _OF_THE_RUN and was.get(name) != now.get(name)
    ]
    if other:
        raise ValueError(
            f"{files.uri} was prepared in another way: {'; '.join(other)}. Append with the same "
            "settings, or prepare a new data set elsewhere"
        )


_OF_THE_RUN = ("limit", "duplicates", "same")
"""Fields of the preparation that may change from version to version: samples stay comparable."""


def _require_writer() -> None:
    if find_spec("pyarrow") is None:
        raise ImportError(
            "preparing a data set needs pyarrow; install with: pip install 'sdn[pipeline]'"
        )

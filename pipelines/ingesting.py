"""What has arrived at the landing place becomes the next version of a data set."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from pipelines.preparing import place, prepare
from pipelines.store import folder_lock
from sdn.config import DataConfig, from_dict
from sdn.data.dead_letters import read_list
from sdn.data.landing import APPENDABLE, Look, Marks, Waiting, arrived
from sdn.data.manifest import MANIFEST, read_manifest, read_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.settings import Settings
    from sdn.data.files import Files
    from sdn.data.manifest import Manifest

logger = logging.getLogger(__name__)

TAKEN = "landed"
"""Folder of a data set: for each version, which files of the landing place went into it."""
_SPARED = 1
"""A single broken file must not keep others out, however few come with it."""


class LandingError(ValueError):
    """The landing place or the data set cannot be used as asked; the text says what to do."""


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """What one look at the landing place came to."""

    landing: str
    dataset: str
    before: Manifest | None
    """The version that was there; None where there was none."""
    manifest: Manifest | None
    """The newest version now; None where there still is none."""
    new: int
    """Images, tables or tars that were taken."""
    waiting: tuple[Waiting, ...]
    waiting_count: int
    """Files that are left for the next look."""

    @property
    def fresh(self) -> bool:
        """Whether there is a version that there was not before."""
        return self.manifest is not None and self.manifest != self.before

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "landing": self.landing,
            "dataset": self.dataset,
            "version": None if self.manifest is None else self.manifest.number,
            "manifest": None if self.manifest is None else self.manifest.digest,
            "before": None if self.before is None else self.before.digest,
            "samples": None if self.manifest is None else self.manifest.counts,
            "new_version": self.fresh,
            "taken": self.new,
            "waiting": self.waiting_count,
            "first_waiting": [dataclasses.asdict(one) for one in self.waiting[:20]],
        }


def ingest(
    landing: str,
    dataset: str,
    config: DataConfig,
    settings: Settings,
    report: Callable[[str, int, int | None], None],
    *,
    look: Look | None = None,
) -> Ingested:
    """Append to a data set what has arrived, or make its first version of it.

    What was taken is noted beside the version that it went into, so that a later look reads what is
    new and nothing else. Cut off anywhere, the next one goes on: a note that is missing costs a
    second reading, whose records are found to be there already.

    Args:
        landing: a folder or s3://bucket/prefix; only ever read.
        dataset: a folder or s3://bucket/prefix.
        config: how a first version is prepared, its source included; later ones are prepared as the
            data set was.
        settings: where Ray and S3 are.
        report: progress.
        look: how the landing place is looked at.

    Raises:
        LandingError: no such place, one inside the other, or a source that cannot grow.
        TooManyDeadLetters: of what came; nothing was appended, and the next look tries again.
        ValueError: as `sdn.data.shards.write_dataset`.
    """
    refuse_nested(landing, dataset)
    files, source = place(dataset, settings), place(landing, settings)
    if "://" not in source.uri and not Path(source.uri).is_dir():
        raise LandingError(
            f"there is no landing place {source.uri}: make the folder, or name another one with "
            "SDN_LANDING"
        )
    with _one_at_a_time(dataset, settings):
        before = read_manifest(files) if files.exists(MANIFEST) else None
        config = _as_before(config, before, landing)
        taken = _taken(files, before)
        known = set() if before is None else _faults(files, before)
        look = dataclasses.replace(look or Look(), known_faults=known)
        arrival = arrived(source, config, taken, look)
        newest = before
        if arrival.new:
            made = prepare(
                config,
                files,
                settings,
                report,
                append=before is not None,
                source=arrival.files,
                spared=_SPARED,
            )
            newest = made or before
            assert newest is not None
            files.write(_note(newest), taken.with_files(arrival.infos).to_bytes())
    return Ingested(
        landing=landing,
        dataset=dataset,
        before=before,
        manifest=newest,
        new=arrival.new,
        waiting=arrival.waiting,
        waiting_count=arrival.waiting_count,
    )


@contextmanager
def only_one(what: str, dataset: str, settings: Settings) -> Iterator[bool]:
    """Whether this process is the only one of this machine that does this with a data set.

    Args:
        what: a name for it.
        dataset: place of the data set.
        settings: where locks lie.

    Yields:
        False where another process does it, which is not waited for.
    """
    lock = folder_lock(settings.cache.expanduser(), _lock_name(what, dataset))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def _one_at_a_time(dataset: str, settings: Settings) -> Iterator[None]:
    """A second process waits, and finds that there is nothing left to take."""
    with folder_lock(settings.cache.expanduser(), _lock_name("ingesting", dataset)):
        yield


def _lock_name(what: str, dataset: str) -> str:
    return f"{what}-{hashlib.sha256(plain(dataset).encode()).hexdigest()[:32]}"


def plain(uri: str) -> str:
    """The same for all ways to write a place."""
    return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().resolve())


def refuse_nested(landing: str, dataset: str) -> None:
    """Return if neither place lies in the other.

    Raises:
        LandingError: one does: the data set would be read into itself.
    """
    outer, inner = (f"{plain(uri)}/" for uri in (landing, dataset))
    if inner.startswith(outer) or outer.startswith(inner):
        raise LandingError(
            f"the landing place {landing} and the data set {dataset} lie one inside the other: the "
            "data set would be read into itself. Put the data set elsewhere"
        )


def _as_before(config: DataConfig, before: Manifest | None, landing: str) -> DataConfig:
    """How the data set is prepared; what no byte depends on is as it is asked for now."""
    if before is not None:
        values = before.preparation | {
            "failure_budget": config.failure_budget,
            "max_pixels": config.max_pixels,
        }
        config = from_dict(DataConfig, values)
    if config.source not in APPENDABLE:
        raise LandingError(
            f"data of the source {config.source!r} cannot grow from a landing place: expected one "
            f"of {', '.join(APPENDABLE)}"
            + ("; name it, or a recipe that has it" if before is None else "")
        )
    return dataclasses.replace(config, path=landing)


def _note(manifest: Manifest) -> str:
    return f"{TAKEN}/{manifest.digest}.bin"


def _taken(files: Files, newest: Manifest | None) -> Marks:
    """What went into the newest version that has a note of it, such as not one by a retry."""
    for manifest in read_versions(files) if newest is not None else ():
        try:
            if files.exists(_note(manifest)):
                return Marks(files.read(_note(manifest)))
        except ValueError as error:
            logger.warning("%s: %s; what went into it is read again", _note(manifest), error)
    return Marks()


def _faults(files: Files, manifest: Manifest) -> set[str]:
    return {letter.where for letter in read_list(files, manifest.dead_letter_file)}

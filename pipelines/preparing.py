"""Data sets: prepared on Ray into a folder or a bucket, appended to, opened for training."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cluster import start_ray
from pipelines.stage import Stage
from pipelines.store import folder_lock, open_files
from sdn.config import DataConfig, from_dict, to_key, with_overrides
from sdn.data import claims
from sdn.data.dataset import DataSet, open_dataset
from sdn.data.dead_letters import KeptLetter, read_list
from sdn.data.manifest import MANIFEST, read_manifest
from sdn.data.retrying import retry_dead_letters
from sdn.data.shards import SHOWN_LETTERS, Writing, append_dataset, write_dataset
from sdn.data.sources import PREPARED, REMOTE, attribution, partitions
from sdn.data.sources.fingerprint import fingerprint, require_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeVar

    from pipelines.run import Done, Run
    from pipelines.settings import Settings
    from sdn.data.files import Files
    from sdn.data.manifest import Manifest
    from sdn.data.shards import Runner

    T = TypeVar("T")
    R = TypeVar("R")


def place(uri: str, settings: Settings) -> Files:
    """The folder or `s3://bucket/prefix` that a user names.

    Raises:
        StoreError: another scheme.
    """
    return open_files(uri, settings.cache, settings.s3_endpoint, settings.cache_gib)


def prepare(
    config: DataConfig,
    files: Files,
    settings: Settings,
    report: Callable[[str, int, int | None], None],
    *,
    append: bool = False,
    source: Files | None = None,
    spared: int = 0,
) -> Manifest | None:
    """Prepare a source into `files`, or append to it what is new; see `sdn.data.shards`.

    Args:
        config: names the source.
        files: the data set.
        settings: where Ray and S3 are.
        report: progress.
        append: go on from the version that is there.
        source: where the source lies, in place of `config.path`.
        spared: see `sdn.data.shards.Writing`.

    Returns:
        The new version; None where an append found nothing new.
    """
    source = source or _source(config, settings)
    writing = _writing(config, fingerprint(config, source), settings, report)
    writing = dataclasses.replace(writing, spared=spared)
    write = append_dataset if append else write_dataset
    with _alone(files, settings):
        return write(partitions(config, source), files, writing)


def retry(
    files: Files,
    settings: Settings,
    report: Callable[[str, int, int | None], None],
    *,
    path: str | None,
    kept: bool,
    changes: dict[str, str],
) -> Manifest | None:
    """Try the dead letters of a data set again.

    Args:
        files: the data set.
        settings: where Ray and S3 are.
        report: progress.
        path: where the source lies now; None takes where it lay.
        kept: use the originals that the data set kept, and no source.
        changes: of the config, such as `max_pixels`, as `with_overrides` takes them.

    Returns:
        The new version; None where nothing was mended.
    """
    manifest = read_manifest(files)
    config = from_dict(DataConfig, manifest.preparation | {"path": path or manifest.origin})
    config = with_overrides(config, changes)
    source = None if kept else _source(config, settings)
    pieces = None if kept else partitions(config, source)
    # What the dead letters were is part of the claim: a retry is never an older one gone on with.
    state = f"retry {manifest.digest} {'kept' if kept else fingerprint(config, source)}"
    with _alone(files, settings):
        return retry_dead_letters(files, _writing(config, state, settings, report), pieces)


def undo(files: Files, settings: Settings) -> tuple[Manifest, Manifest]:
    """Take the newest version of a data set away; see `sdn.data.claims.undo`."""
    with _alone(files, settings):
        return claims.undo(files)


def check_source(config: DataConfig, settings: Settings) -> None:
    """Refuse a source in whose place there is nothing; its layout is read later.

    Raises:
        ValueError: no place is named, or one that the source does not need; nothing lies there.
        OSError: the place cannot be reached.
    """
    if config.source == "openmoji":
        if config.path is not None:
            raise ValueError(
                f"the source openmoji carries its own images, but data.path is {config.path}: name "
                "the source of that place (such as folder), or leave the place out"
            )
    elif config.source == PREPARED:
        read_manifest(_prepared(config, settings))
    elif (files := _source(config, settings)) is None:
        raise ValueError(
            f"the source {config.source} needs the place of your images: --set data.path=FOLDER, "
            "in Prefect's form the field data_path"
        )
    else:
        require_files(files)


def prepare_stage(config: DataConfig, settings: Settings) -> Stage:
    """The stage of preparation; its input is what the source holds now."""
    if config.source == PREPARED:
        return Stage(
            name="prepare",
            config=to_key(config),
            inputs={"data": read_manifest(_prepared(config, settings)).digest},
        )
    found = fingerprint(config, _source(config, settings))
    return Stage(name="prepare", config=to_key(config), inputs={"source": found})


def prepare_into_store(
    run: Run, folder: str, report: Callable[[str, int, int | None], None]
) -> dict[str, Any]:
    """What the stage of preparation does; a data set made already is taken where it lies.

    Returns:
        The stage's result: `manifest` (digest), `place` (where it lies, None in the stage's own
        folder), `samples`, `exclusions`, `duplicates`, `dead_letters`, `attribution`.
    """
    config = run.config.data
    if config.source == PREPARED:
        files = _prepared(config, run.settings)
        manifest = read_manifest(files)
        _refuse_other_size(manifest, config)
    else:
        files = run.store.files(folder)
        if files.exists(MANIFEST):
            manifest = read_manifest(files)
        else:
            made = prepare(config, files, run.settings, report)
            assert made is not None
            manifest = made
    return about_version(manifest, config.path if config.source == PREPARED else None)


def about_version(manifest: Manifest, place: str | None) -> dict[str, Any]:
    """What the stage of preparation says of a version; see `prepare_into_store`."""
    return {
        "manifest": manifest.digest,
        "place": place,
        "samples": manifest.counts,
        "exclusions": manifest.exclusions,
        "duplicates": manifest.duplicates,
        "dead_letters": manifest.dead_letters,
        "attribution": manifest.attribution,
    }


def data_uri(run: Run, data: Done) -> str:
    """Where the data set of a finished preparation lies."""
    return data.result["place"] or run.store.files(data.folder).uri


def data_set(run: Run, data: Done) -> DataSet:
    """The data set of a finished preparation, in the version that it was."""
    return open_dataset(place(data_uri(run, data), run.settings), data.result["manifest"])


def on_ray(settings: Settings) -> Runner:
    """Runs the orders of a preparation as Ray tasks of one core each, on a cluster or here."""

    def run(work: Callable[[T], R], orders: Iterable[T], /) -> Iterator[R]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        start_ray(settings)
        task = ray.remote(num_cpus=1)(work)
        # Two a core: the next one waits beside each that works, and no more are held in memory.
        ahead = 2 * int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        begun: list[Any] = []

        def first_done() -> R:
            (done,), begun[:] = ray.wait(begun, num_returns=1)
            try:
                result: R = ray.get(done)
            except RayTaskError as error:
                raise error.cause or error from error
            except RayError as error:
                raise RuntimeError(
                    f"a worker of Ray was lost more often than a task is tried ({error}); often "
                    "that is memory: set SDN_CPUS lower, and run the same command again to go on"
                ) from error
            return result

        try:
            for order in orders:
                begun.append(task.remote(order))
                if len(begun) >= ahead:
                    yield first_done()
            while begun:
                yield first_done()
        finally:
            for left in begun:
                ray.cancel(left, force=False)

    return run


@contextmanager
def _alone(files: Files, settings: Settings) -> Iterator[None]:
    """Only one process of this machine writes into a place at a time."""
    from filelock import Timeout

    place = files.uri if "://" in files.uri else str(Path(files.uri).resolve())
    name = hashlib.sha256(place.encode()).hexdigest()[:32]
    lock = folder_lock(settings.cache.expanduser(), f"writing-{name}")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(
            f"another process is writing into {files.uri}: wait until it has ended"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _writing(
    config: DataConfig,
    state: str,
    settings: Settings,
    report: Callable[[str, int, int | None], None],
) -> Writing:
    return Writing(
        config=config,
        attribution=attribution(config.source),
        fingerprint=state,
        run=on_ray(settings),
        report=report,
    )


def _source(config: DataConfig, settings: Settings) -> Files | None:
    if config.path is None:
        return None
    if "://" in config.path and config.source not in REMOTE:
        raise ValueError(
            f"the source {config.source!r} needs a local folder, not {config.path}; "
            f"{', '.join(REMOTE)} can lie on S3"
        )
    return place(config.path, settings)


def _prepared(config: DataConfig, settings: Settings) -> Files:
    if config.path is None:
        raise ValueError(
            "data.path is not set: the source 'shards' needs the place of a data set that "
            "`sdn prepare` has made (--set data.path=PLACE)"
        )
    return place(config.path, settings)


def _refuse_other_size(manifest: Manifest, config: DataConfig) -> None:
    if manifest.resolution != config.resolution:
        raise ValueError(
            f"the data set at {config.path} has images of {manifest.resolution} pixels, but "
            f"data.resolution is {config.resolution}: set it to {manifest.resolution}"
        )


def first_letters(run: Run, data: Done) -> list[dict[str, str]]:
    """The first dead letters of a data set: key, where, reason."""
    dataset = data_set(run, data)
    letters = read_list(dataset.files, dataset.manifest.dead_letter_file)
    return letter_rows(islice(letters, SHOWN_LETTERS))


def letter_rows(letters: Iterable[KeptLetter]) -> list[dict[str, str]]:
    """Dead letters as rows of a table."""
    return [{"key": x.key, "where": x.where, "reason": x.reason} for x in letters]

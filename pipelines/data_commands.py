"""`sdn prepare`, `sdn verify` and `sdn data ...`: data sets from the command line."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.terminal import (
    JsonOption,
    SetOption,
    answer,
    counting,
    expected_errors,
    quiet,
    say,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdn.data.dataset import DataSet
    from sdn.data.dead_letters import KeptLetter
    from sdn.data.files import Files
    from sdn.data.manifest import Manifest

data = typer.Typer(
    name="data", help="Versions, differences and dead letters of a data set.", no_args_is_help=True
)

Place = Annotated[str, typer.Argument(help="A prepared data set: a folder, or s3://...")]
_SHOWN = 20


def prepare(
    source: Annotated[str, typer.Argument(help="Name of a source, such as folder or openmoji.")],
    out: Annotated[
        str, typer.Option("--out", help="Where the data set goes: a new folder, or s3://...")
    ],
    path: Annotated[str | None, typer.Argument(help="Where the source lies.")] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add what is new to the data set that is there.")
    ] = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn captioned images into WebDataset shards with index and manifest."""
    with expected_errors():
        quiet()
        from pipelines import preparing
        from pipelines.cluster import stop_ray
        from pipelines.orphans import ended_with_this_process
        from pipelines.run import parse_overrides
        from pipelines.settings import Settings
        from sdn.config import DataConfig, with_overrides
        from sdn.data.dead_letters import TooManyDeadLetters
        from sdn.data.manifest import read_manifest

        settings = Settings()
        config = with_overrides(DataConfig(source=source, path=path), parse_overrides(set_ or []))
        files = preparing.place(out, settings)
        with ended_with_this_process(), counting(to_stderr=True) as report:
            try:
                made = preparing.prepare(config, files, settings, report, append=append)
            except TooManyDeadLetters as error:
                show_letters(error.letters)
                raise
            finally:
                stop_ray()
        manifest = read_manifest(files) if made is None else made
        if not as_json:
            if made is None:
                say("nothing new: every record is there already")
            _summary(out, manifest)
            show_letters(_read_letters(files, manifest), manifest.dead_letters)
        answer(_about(out, manifest) | {"new_version": made is not None}, as_json=as_json)


def verify(
    uri: Place,
    version: Annotated[
        str | None, typer.Option("--version", help="Beginning of a version's digest.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a data set; exit 1 with the list of damages."""
    with expected_errors():
        from pipelines.preparing import place
        from pipelines.settings import Settings
        from sdn.data.verification import verify as find_damages

        with counting(to_stderr=True) as report:
            damages = find_damages(
                place(uri, Settings()), version, lambda done, total: report("checked", done, total)
            )
        if not as_json:
            for damage in damages:
                say(f"damaged: {damage}")
            say(f"{uri}: damaged, {len(damages)} found" if damages else f"{uri}: whole")
        answer({"uri": uri, "damages": damages}, as_json=as_json)
        if damages:
            raise typer.Exit(1)


@data.command()
def log(uri: Place, as_json: JsonOption = False) -> None:
    """The versions of a data set, the newest first."""
    with expected_errors():
        from pipelines.preparing import place
        from pipelines.settings import Settings
        from sdn.data.manifest import read_versions
        from sdn.data.records import SPLITS

        versions = read_versions(place(uri, Settings()))
        rows = []
        for manifest, before in itertools.zip_longest(versions, versions[1:]):
            came = [manifest.samples(s) - (before.samples(s) if before else 0) for s in SPLITS]
            rows.append(
                (
                    str(manifest.number),
                    manifest.digest[:12],
                    *(
                        f"{manifest.samples(split):,}" + (f" (+{new:,})" if new and before else "")
                        for split, new in zip(SPLITS, came, strict=True)
                    ),
                    f"{manifest.dead_letters:,}",
                )
            )
        if not as_json:
            table(("", "digest", *SPLITS, "dead letters"), rows)
        answer({"versions": [_about(uri, manifest) for manifest in versions]}, as_json=as_json)


@data.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A place, or PLACE@VERSION.")],
    after: Annotated[str, typer.Argument(metavar="B", help="A place, or PLACE@VERSION.")],
    as_json: JsonOption = False,
) -> None:
    """What came, went or changed between two data sets or versions (number or digest)."""
    with expected_errors():
        from sdn.data.history import difference
        from sdn.data.records import SPLITS

        found = difference(_opened(before), _opened(after))
        if not as_json:
            rows = [
                (kind, *(f"{counts[split]:,}" for split in SPLITS))
                for kind, counts in found.counts.items()
            ]
            shards = tuple(f"{a} -> {b}" for a, b in found.shards.values())
            table(("samples", *SPLITS), [*rows, ("shards", *shards)])
            for kind, keys in found.keys.items():
                if keys:
                    more = sum(found.counts[kind].values()) - len(keys)
                    rest = f" and {more:,} more" if more else ""
                    say(f"{kind}: {', '.join(keys)}{rest}")
            for name, (old, new) in found.preparation.items():
                say(f"preparation: {name} was {old!r}, is {new!r}")
            say("dead letters: {} -> {}".format(*found.dead_letters))
        answer(dataclasses.asdict(found), as_json=as_json)


@data.command()
def undo(uri: Place, as_json: JsonOption = False) -> None:
    """Take the newest version away, with the shards that it added."""
    with expected_errors():
        from pipelines import preparing
        from pipelines.settings import Settings

        settings = Settings()
        gone, newest = preparing.undo(preparing.place(uri, settings), settings)
        if not as_json:
            say(f"version {gone.number} is gone; version {newest.number} is the newest again")
        answer(_about(uri, newest) | {"gone": gone.digest}, as_json=as_json)


@data.command()
def letters(uri: Place, as_json: JsonOption = False) -> None:
    """The dead letters of a data set: key, place and reason of each."""
    with expected_errors():
        from pipelines.preparing import place
        from pipelines.settings import Settings
        from sdn.data.manifest import read_manifest

        files = place(uri, Settings())
        manifest = read_manifest(files)
        found = list(_read_letters(files, manifest))
        if not as_json:
            show_letters(found, len(found), shown=len(found))
            if not found:
                say(f"{uri}: no dead letters")
        answer({"dead_letters": [dataclasses.asdict(x) for x in found]}, as_json=as_json)


@data.command()
def retry(
    uri: Place,
    path: Annotated[
        str | None, typer.Option("--path", help="Where the source lies now, if not where it lay.")
    ] = None,
    kept: Annotated[
        bool, typer.Option("--kept", help="Use the originals kept in the data set, not the source.")
    ] = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try the dead letters again after a fix; what succeeds is appended as a new version."""
    with expected_errors():
        quiet()
        from pipelines import preparing
        from pipelines.cluster import stop_ray
        from pipelines.orphans import ended_with_this_process
        from pipelines.run import parse_overrides
        from pipelines.settings import Settings
        from sdn.data.manifest import read_manifest

        settings = Settings()
        files = preparing.place(uri, settings)
        before = read_manifest(files)
        with ended_with_this_process(), counting(to_stderr=True) as report:
            try:
                made = preparing.retry(
                    files,
                    settings,
                    report,
                    path=path,
                    kept=kept,
                    changes=parse_overrides(set_ or []),
                )
            finally:
                stop_ray()
        manifest = made or before
        mended = sum(manifest.counts.values()) - sum(before.counts.values())
        if not as_json:
            say(f"{before.dead_letters} dead letters tried, {mended} mended")
            show_letters(_read_letters(files, manifest), manifest.dead_letters)
        answer(_about(uri, manifest) | {"mended": mended}, as_json=as_json)


def _opened(text: str) -> DataSet:
    from pipelines.preparing import place
    from pipelines.settings import Settings
    from sdn.data.dataset import open_dataset
    from sdn.data.manifest import read_versions

    uri, at, version = text.rpartition("@")
    if not at:
        return open_dataset(place(text, Settings()))
    files = place(uri, Settings())
    if version.isdigit() and len(version) < 6:
        numbers = {manifest.number: manifest.digest for manifest in read_versions(files)}
        if int(version) not in numbers:
            raise ValueError(f"{uri} has no version {version}; there are 1 to {max(numbers)}")
        version = numbers[int(version)]
    return open_dataset(files, version)


def _about(uri: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "folder": uri,
        "version": manifest.number,
        "manifest": manifest.digest,
        "parent": manifest.parent,
        "samples": manifest.counts,
        "exclusions": manifest.exclusions,
        "duplicates": manifest.duplicates,
        "dead_letters": manifest.dead_letters,
    }


def _summary(uri: str, manifest: Manifest) -> None:
    rows = [
        *((f"{split} samples", f"{n:,}") for split, n in manifest.counts.items()),
        *((f"excluded: {reason}", f"{n:,}") for reason, n in manifest.exclusions.items()),
        *((f"found twice: {what}", f"{n:,}") for what, n in manifest.duplicates.items()),
        ("dead letters", f"{manifest.dead_letters:,}"),
        (f"manifest of version {manifest.number}", manifest.digest),
    ]
    table(("data set", uri), rows)


def _read_letters(files: Files, manifest: Manifest) -> Iterable[KeptLetter]:
    from sdn.data.dead_letters import read_list

    return read_list(files, manifest.dead_letter_file)


def show_letters(
    letters: Iterable[KeptLetter], total: int | None = None, *, shown: int = _SHOWN
) -> None:
    """The first dead letters as a table, on standard error beside an error."""
    rows = [(x.key, x.where, x.reason) for x in itertools.islice(letters, shown)]
    if rows:
        table(("dead letter", "where", "reason"), rows, to_stderr=total is None)
    if total is not None and total > len(rows):
        say(f"and {total - len(rows):,} more: `sdn data letters` lists all")

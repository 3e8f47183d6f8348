"""`sdn lineage`: from a model or an image back to its data, from the command line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.terminal import JsonOption, StoreOption, answer, expected_errors, quiet, say, table

if TYPE_CHECKING:
    from pipelines.lineage import Lineage

_SHARD = ("name", "samples", "bytes", "sha256")
_RUN = ("name", "status", "id", "url")


def lineage(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_PNG",
            help="models:/NAME@champion, a model's name, a model folder, or a PNG that `sdn "
            "generate` wrote.",
        ),
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Data, shards, configs and runs behind a model or an image; exit 1 if they do not agree."""
    with expected_errors():
        quiet()
        from pipelines.lineage import trace

        found = trace(target, store)
        if not as_json:
            _show(found)
        answer(found.as_dict(), as_json=as_json)
        if found.problems:
            raise typer.Exit(1)


def _show(found: Lineage) -> None:
    if found.image is not None:
        scale = found.image.get("noise_scale")
        noise = f", noise scale {scale}" if scale else ""
        say(f"Drawn: {found.image['caption']!r}, seed {found.image['seed']}{noise}")
    shards = found.data.get("shards", [])
    facts = {name: value for name, value in found.data.items() if name != "shards"}
    for what, values in (("model", found.model), ("decision", found.decision), ("data", facts)):
        _table((what, ""), [(name, _text(name, value)) for name, value in values.items() if value])
    _table(_SHARD, [tuple(str(shard[name]) for name in _SHARD) for shard in shards])
    if (more := found.data.get("shard_count", 0) - len(shards)) > 0:
        say(f"and {more:,} more shards")
    _table(("stage", "key", "folder", "seconds"), [_stage(one) for one in found.stages])
    for one in found.stages:  # no column of theirs: they are far wider than a terminal
        config = "not reached" if one["config"] is None else json.dumps(one["config"])
        say(f"config of {one['name']}: {config}")
    _table(_RUN, [tuple(run[name] for name in _RUN) for run in found.runs])
    for text in found.unreached:
        say(f"not reached: {text}", error=True)
    for text in found.problems:
        say(f"does not agree: {text}", error=True)
    if not found.problems:
        say("what was reached agrees" if found.unreached else "folders and digests agree")


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table, where there is something to show."""
    if rows:
        table(headings, rows)


def _stage(one: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of stages."""
    seconds = "" if one["seconds"] is None else str(one["seconds"])
    return one["name"], one["key"], one["folder"], seconds


def _text(name: str, value: object) -> str:
    """A cell of a table."""
    if name == "registered_ms" and isinstance(value, int):
        return datetime.fromtimestamp(value / 1000, UTC).isoformat(timespec="seconds")
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {count}" for key, count in value.items())
    return str(value)

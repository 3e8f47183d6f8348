"""What the commands of the command line share: quiet libraries, clear errors, tables, answers."""

from __future__ import annotations

import json
import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.dropped_signals import heard_again
from pipelines.masking import masked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Folder or s3://bucket/prefix [default: SDN_STORE, else runs]"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change of the config; may be repeated."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object as the last line of standard output.")
]


def quiet() -> None:
    """Embedded parts stay silent and ask nobody outside; servers are shown SDN_AUTH.

    Anything set already is kept.

    Raises:
        ValueError: SDN_AUTH is not what servers take, or a variable is malformed.
    """
    from pipelines.settings import Settings

    for name, value in {
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",  # 20 is short on busy cores
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables; the search has its bar here
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "RAY_USAGE_STATS_ENABLED": "0",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    # What libraries warn developers of; among it MLflow's wish for type hints on predict, which
    # would drop the model's parameters.
    logging.captureWarnings(capture=True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    for name, value in Settings().logins.items():
        os.environ.setdefault(name, value)


@contextmanager
def expected_errors() -> Iterator[None]:
    """An expected error is one clear line and exit 1, not a traceback; no Ctrl-C is dropped."""
    try:
        with heard_again():
            yield
    except typer.Exit:  # a RuntimeError too
        raise
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if _with_traceback():
            raise
        say(f"error: {masked(str(error))}", error=True)
        raise typer.Exit(1) from error


def _with_traceback() -> bool:
    from pipelines.settings import Settings

    try:
        return Settings().traceback
    except ValueError:  # a malformed variable, which is the error that is told
        return False


def say(text: str, *, error: bool = False) -> None:
    """A line for the reader."""
    typer.echo(text, err=error)


def table(
    headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, to_stderr: bool = False
) -> None:
    """A table as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = Table(*headings)
    for row in rows:
        # As it is: brackets are no markup here, and a digest is not cut off.
        found.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console(stderr=to_stderr).print(found)


@contextmanager
def counting(*, to_stderr: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """Progress of a preparation; yields what to call with (step, done, of how many if known)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bars = Progress(*columns, console=Console(stderr=to_stderr), transient=True)
    tasks: dict[str, Any] = {}

    def report(step: str, done: int, total: int | None) -> None:
        bars.start()  # only now: an error before any work leaves no blank line
        if step not in tasks:
            tasks[step] = bars.add_task(step, total=total)
        bars.update(tasks[step], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


def answer(found: dict[str, Any], *, as_json: bool) -> None:
    """What a program reads: one JSON object in the last line, if it was asked for."""
    if as_json:
        typer.echo(json.dumps(found))

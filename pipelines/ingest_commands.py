"""`sdn ingest` and `sdn retrain`: data that arrive, from the command line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.terminal import (
    JsonOption,
    SetOption,
    StoreOption,
    answer,
    counting,
    expected_errors,
    quiet,
    say,
    table,
)

if TYPE_CHECKING:
    from pipelines.ingesting import Ingested
    from pipelines.run import Run

Landing = Annotated[
    str | None,
    typer.Argument(help="Where data arrive: a folder, or s3://...  [default: SDN_LANDING]"),
]
Into = Annotated[
    str | None,
    typer.Option(
        "--into",
        metavar="DATASET",
        help="The data set that grows: a folder, or s3://... [default: SDN_DATASET, else landed "
        "in the store]",
    ),
]
Recipe = Annotated[
    str, typer.Option("--recipe", help="How a first version is prepared; see `sdn recipes`.")
]
Source = Annotated[
    str | None,
    typer.Option("--source", help="Layout of the landing place, for a first version."),
]
Settle = Annotated[
    float, typer.Option("--settle-s", min=0, help="What changed so lately is left for later.")
]
_SHOWN = 10


def ingest(
    landing: Landing = None,
    into: Into = None,
    recipe: Recipe = "folder",
    source: Source = None,
    settle_s: Settle = 10.0,
    store: StoreOption = None,
    set_: SetOption = None,
    notify_event: Annotated[
        bool,
        typer.Option(
            "--notify-event",
            help="Tell the Prefect server (PREFECT_API_URL) if something came: a retraining is "
            "due then.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Take what has arrived into the data set, and say what it was."""
    with expected_errors():
        quiet()
        import dataclasses

        from pipelines import ingesting
        from pipelines.cluster import stop_ray
        from pipelines.data_commands import show_letters
        from pipelines.data_report import told, write_data_report
        from pipelines.orphans import ended_with_this_process
        from pipelines.preparing import place
        from pipelines.run import RunSpec, parse_overrides
        from sdn.data.dataset import DataSet
        from sdn.data.dead_letters import TooManyDeadLetters
        from sdn.data.landing import Look

        run = RunSpec(recipe, parse_overrides(set_ or []), store).open()
        config = run.config.data
        if source is not None:
            config = dataclasses.replace(config, source=source)
        # As it is named on this machine: the event takes it to a worker in another folder.
        where = ingesting.plain(_landing(landing, run))
        api = _server(run) if notify_event else None  # before anything that would not come again
        dataset = ingesting.plain(into or run.settings.grown)
        with ended_with_this_process(), counting(to_stderr=True) as report:
            try:
                look = Look(settle_s=settle_s)
                found = ingesting.ingest(where, dataset, config, run.settings, report, look=look)
            except TooManyDeadLetters as error:
                show_letters(error.letters)
                raise
            finally:
                stop_ray()
        told_of: dict[str, Any] | None = None
        if found.fresh:
            assert found.manifest is not None
            data = DataSet(place(dataset, run.settings), found.manifest)
            done = write_data_report(run, data, found.before)
            told_of = done.result | {"folder": str(run.store.fetch(done.folder))}
        if not as_json:
            for line in told(told_of) if told_of else [f"nothing new at {where}"]:
                say(line)
            _show_waiting(found)
        if api is not None and found.fresh:
            _notify(api, where, dataset, found)
        answer(found.as_dict() | {"report": told_of}, as_json=as_json)


def retrain(
    landing: Landing = None,
    into: Into = None,
    recipe: Recipe = "folder",
    source: Source = None,
    min_new: Annotated[
        int, typer.Option("--min-new", min=1, help="New training samples that are worth it.")
    ] = 100,
    settle_s: Settle = 10.0,
    quiet_s: Annotated[
        float, typer.Option("--quiet-s", min=0, help="Begin when nothing came for so long.")
    ] = 60.0,
    epochs: Annotated[
        float | None,
        typer.Option("--epochs", help="Length [default: a quarter of the recipe's last stage]"),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", help="Learning rate [default: three tenths of the recipe's]"),
    ] = None,
    store: StoreOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take what has arrived; if enough came, train on from the champion; promote if better."""
    from pipelines.console import Display

    with expected_errors():
        quiet()
        from pipelines.data_commands import show_letters
        from pipelines.flows.early_server import early_server
        from pipelines.orphans import ended_with_this_process
        from sdn.data.dead_letters import TooManyDeadLetters

        display = Display(to_stderr=as_json)
        wanted: dict[str, Any] = {
            "landing": landing or "",
            "dataset": into or "",
            "recipe": recipe,
            "source": source or "recipe",
            "min_new": min_new,
            "settle_s": settle_s,
            "quiet_s": quiet_s,
            "epochs": epochs or 0.0,
            "rate": rate or 0.0,
            "store": store or "",
            "changes": set_ or [],
        }
        try:
            with (
                ended_with_this_process(),
                early_server() as ready,
                display.progress() as progress,
            ):
                from pipelines.flows.retrain import retrain as flow
                from pipelines.flows.stages import terminal

                importlib.import_module("pipelines.flows.growing")  # what it needs, meanwhile
                ready()
                token = terminal.set(progress)
                try:
                    found: dict[str, Any] = flow(**wanted)
                finally:
                    terminal.reset(token)
        except TooManyDeadLetters as error:
            show_letters(error.letters)
            raise
        if not as_json:
            say(f"{found['outcome']}: {found['message']}")
        answer(found, as_json=as_json)


def _landing(landing: str | None, run: Run) -> str:
    found = landing or run.settings.landing
    if found is None:
        raise ValueError(
            "no landing place: name the folder or s3://bucket/prefix where data arrive, or set "
            "SDN_LANDING"
        )
    return found


def _show_waiting(found: Ingested) -> None:
    if found.waiting_count:
        rows = [(one.name, one.reason) for one in found.waiting[:_SHOWN]]
        table(("left for the next look", "why"), rows)
        if found.waiting_count > len(rows):
            say(f"and {found.waiting_count - len(rows):,} more")


def _server(run: Run) -> str:
    """Address of the Prefect server that is to be told.

    Raises:
        ValueError: there is none.
    """
    api = run.settings.prefect_api_url
    if api is None:
        raise ValueError(
            "--notify-event needs PREFECT_API_URL, the address of the Prefect server that the "
            "deployment sdn-retrain is on. Nothing was taken"
        )
    return api


def _notify(api: str, landing: str, dataset: str, found: Ingested) -> None:
    """Send the event; the data are in the data set whether it arrives or not."""
    from pipelines.flows.arrival import EVENT, arrival_event, send
    from pipelines.masking import masked

    assert found.manifest is not None
    send(arrival_event(landing, dataset, found.manifest.digest))
    say(f"sent {EVENT} to {masked(api)}", error=True)

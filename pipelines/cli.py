"""One command, `sdn`."""

from __future__ import annotations

import importlib
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated, cast

import typer

from pipelines import (
    data_commands,
    ingest_commands,
    lineage_command,
    registry_commands,
    stack_commands,
    training_commands,
)
from pipelines.notify_command import notify
from pipelines.play_command import play
from pipelines.reconcile_command import reconcile
from pipelines.serve_commands import serve
from pipelines.terminal import (
    JsonOption,
    SetOption,
    StoreOption,
    answer,
    expected_errors,
    quiet,
    say,
    table,
)

app = typer.Typer(
    name="sdn",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",  # as "rich" it would take [default: ...] for markup, and hide it
)
app.command()(data_commands.prepare)
app.command()(data_commands.verify)
app.command()(ingest_commands.ingest)
app.command()(ingest_commands.retrain)
app.command()(training_commands.ledger)
app.command()(registry_commands.promote)
app.command()(registry_commands.rollback)
app.command()(lineage_command.lineage)
app.command()(play)
app.command()(stack_commands.up)
app.command()(stack_commands.status)
app.command()(stack_commands.down)
app.command()(stack_commands.deploy)
app.command()(reconcile)
app.command()(notify)
app.add_typer(data_commands.data)
app.add_typer(serve)


def _show_version(asked: bool) -> None:
    if asked:
        say(f"sdn {metadata.version('sdn')}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and end."
        ),
    ] = False,
) -> None:
    """Text-to-image by Symmetrical Distillation Networks: train, evaluate, register, generate."""


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="See `sdn recipes`.")] = "openmoji",
    store: StoreOption = None,
    set_: SetOption = None,
    weights_from: Annotated[
        str | None,
        typer.Option(
            "--weights-from",
            metavar="RUN",
            help="Take what an earlier search found, and search no more (unless search.trials is "
            "set, too): an MLflow run, search-... of the store, or a weights.json.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show the resolved config, and forecast time, memory and disk."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the whole pipeline; what is done already is not done again."""
    from pipelines.console import Display

    with expected_errors():
        quiet()
        from pipelines.inputs import check_inputs
        from pipelines.run import RunSpec, parse_overrides

        if weights_from is not None and not weights_from.strip():
            raise ValueError("--weights-from is empty: name a search, or leave the option out")
        spec = RunSpec(recipe, parse_overrides(set_ or []), store, weights_from)
        opened = spec.open()
        display = Display(to_stderr=as_json)
        if dry_run:
            from pipelines.forecasting import HEADINGS, NOT_COUNTED, as_dicts, as_rows, forecast

            plan = display.plan(opened)
            forecasts, warnings = forecast(opened, lambda text: say(text, error=True))
            table(HEADINGS, as_rows(forecasts), to_stderr=as_json)
            say(NOT_COUNTED, error=as_json)
            for warning in warnings:
                say(f"warning: {warning}", error=True)
            more = {"forecast": as_dicts(forecasts), "warnings": warnings}
            answer(plan | more, as_json=as_json)
            return
        opened.store.check()
        check_inputs(opened)
        from pipelines.flows.early_server import early_server
        from pipelines.orphans import ended_with_this_process
        from sdn.data.dead_letters import TooManyDeadLetters

        try:
            with (
                ended_with_this_process(),
                early_server() as ready,
                display.progress() as progress,
            ):
                from pipelines.flows.form import RecipeName
                from pipelines.flows.pipeline import pipeline
                from pipelines.flows.stages import terminal

                importlib.import_module("pipelines.flows.chain")  # what the flow needs, meanwhile
                ready()
                token = terminal.set(progress)
                try:
                    found = pipeline(
                        recipe=cast("RecipeName", recipe),
                        store=store or "",
                        weights_from=weights_from or "",
                        changes=set_ or [],
                    )
                finally:
                    terminal.reset(token)
        except TooManyDeadLetters as error:
            data_commands.show_letters(error.letters)
            raise
        display.result(found)
        answer(found, as_json=as_json)


@app.command()
def recipes(*, as_json: JsonOption = False) -> None:
    """The named runs there are."""
    from sdn.recipes import RECIPES

    found = {name: " ".join((make.__doc__ or "").split()) for name, make in RECIPES.items()}
    if not as_json:
        table(("recipe", "what it is"), list(found.items()))
    answer(found, as_json=as_json)


@app.command()
def generate(
    captions: Annotated[list[str], typer.Argument(help="What to draw.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="models:/NAME@champion, models:/NAME/VERSION or a model folder "
            "[default: the champion registered last]",
        ),
    ] = None,
    store: StoreOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="PNG file, or folder for several images.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="For models with noise; kept with the image.")
    ] = 0,
    each: Annotated[
        int,
        typer.Option(
            "--each", min=1, help="Images of each caption, with this and the following seeds."
        ),
    ] = 1,
    noise_scale: Annotated[
        float | None,
        typer.Option(
            "--noise-scale",
            min=0,
            help="0 to 3: below 1 images of a caption are more alike, above they differ more "
            "[default: the model's own]",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw images of captions with the champion of the registry, or another model."""
    with expected_errors():
        from pipelines.generation import draw, find_model, names_a_file, write_images

        quiet()
        names_a_file(out, len(captions) * each)  # refused before anything is drawn
        found = find_model(model, store)
        drawn = draw(found.folder, captions, seed=seed, each=each, noise_scale=noise_scale)
        images = write_images(
            drawn, captions, out, model=found, seed=seed, each=each, noise_scale=noise_scale
        )
        if not as_json:
            for n, path in enumerate(images):
                say(f"{path}: {captions[n // each]} ({found.title})")
        paths = [str(path) for path in images]
        answer({"model": found.title, "uri": found.uri, "images": paths}, as_json=as_json)


@app.command()
def evaluate(
    model: Annotated[
        str | None,
        typer.Option("--model", help="As for generate; its data set and teacher are used."),
    ] = None,
    store: StoreOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on the test captions of its data set, the champion beside it, in a report."""
    with expected_errors():
        quiet()
        from pipelines.console import Display
        from pipelines.run import parse_overrides
        from pipelines.scoring import score_model

        display = Display(to_stderr=as_json)
        with display.progress() as progress:
            found = score_model(model, store, parse_overrides(set_ or []), progress)
        display.scores(found)
        if found["compared_with"] != "untrained weights":
            say(found["decision"]["reason"], error=as_json)
        say(f"contact sheet: {found['contact_sheet']}", error=as_json)
        say(f"report: {found['report']}", error=as_json)
        answer(found, as_json=as_json)


@app.command()
def doctor(store: StoreOption = None, *, as_json: JsonOption = False) -> None:
    """What is installed, which device, which servers answer, what is missing and what to do."""
    with expected_errors():
        with suppress(ValueError):  # a malformed variable has a line of its own
            quiet()
        from pipelines.diagnosis import diagnose

        checks = diagnose(store)
        if not as_json:
            table(
                ("", "what", "found", "what to do"),
                [
                    ("ok" if c.ok else "!!", c.what, c.found, "" if c.ok else c.remedy)
                    for c in checks
                ],
            )
        answer({"checks": [c.as_dict() for c in checks]}, as_json=as_json)
        if not all(c.ok for c in checks):
            raise typer.Exit(1)


@app.command()
def ui(
    store: StoreOption = None,
    mlflow_port: Annotated[int, typer.Option("--mlflow-port", min=1, max=65535)] = 5000,
    prefect_port: Annotated[int, typer.Option("--prefect-port", min=1, max=65535)] = 4200,
) -> None:
    """Open the pages of MLflow and Prefect on this machine, until Ctrl-C."""
    with expected_errors():
        quiet()
        from pipelines import ui as pages
        from pipelines.orphans import ended_with_this_process
        from pipelines.settings import Settings

        settings = Settings() if store is None else Settings(store=store)
        with ended_with_this_process():
            pages.serve(settings, mlflow_port, prefect_port, say)


if __name__ == "__main__":
    app()

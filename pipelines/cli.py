"""One command, `sdn`."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

app = typer.Typer(
    name="sdn",
    help="Text-to-image by Symmetrical Distillation Networks: train, evaluate, register, generate.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

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


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="See `sdn recipes`.")] = "openmoji",
    store: StoreOption = None,
    set_: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved config and what would be done.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the whole pipeline; what is done already is not done again."""
    from pipelines.console import Display

    with _errors():
        _quiet()
        from pipelines.flows.pipeline import RecipeName, parse_overrides, pipeline
        from pipelines.run import RunSpec

        spec = RunSpec(recipe, parse_overrides(set_ or []), store)
        opened = spec.open()
        display = Display(to_stderr=as_json)
        if dry_run:
            _answer(display.plan(opened), as_json=as_json)
            return
        opened.store.check()
        from pipelines.flows.stages import terminal
        from pipelines.orphans import ended_with_this_process

        with ended_with_this_process(), display.progress() as progress:
            token = terminal.set(progress)
            try:
                found = pipeline(cast("RecipeName", recipe), store, set_ or [])
            finally:
                terminal.reset(token)
        display.result(found)
        _answer(found, as_json=as_json)


@app.command()
def recipes(*, as_json: JsonOption = False) -> None:
    """The named runs there are."""
    from sdn.recipes import RECIPES

    found = {name: " ".join((make.__doc__ or "").split()) for name, make in RECIPES.items()}
    if not as_json:
        _table(("recipe", "what it is"), list(found.items()))
    _answer(found, as_json=as_json)


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="Name of a source, such as folder or openmoji.")],
    out: Annotated[
        str, typer.Option("--out", help="Where the data set goes: a new folder, or s3://...")
    ],
    path: Annotated[str | None, typer.Argument(help="Where the source lies.")] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn captioned images into WebDataset shards with index and manifest."""
    with _errors():
        from pipelines import s3
        from pipelines.flows.pipeline import parse_overrides
        from pipelines.settings import Settings
        from sdn.config import DataConfig, with_overrides
        from sdn.data.manifest import MANIFEST
        from sdn.data.shards import write_dataset
        from sdn.data.sources import attribution, read_source

        config = with_overrides(DataConfig(source=source, path=path), parse_overrides(set_ or []))
        with _local_copy(out) as folder:
            manifest = write_dataset(
                read_source(config),
                folder,
                config,
                attribution=attribution(source),
                report=_counting,
            )
            if "://" in out:
                s3.upload(folder, out, Settings().s3_endpoint, last=MANIFEST)
        samples = {split: manifest.samples(split) for split in manifest.splits}
        rows = [
            *((f"{split} samples", str(n)) for split, n in samples.items()),
            *((f"excluded: {reason}", str(n)) for reason, n in manifest.exclusions.items()),
            ("dead letters", str(manifest.dead_letters)),
            ("manifest", manifest.digest),
        ]
        if not as_json:
            _table(("data set", out), rows)
        found = {
            "folder": out,
            "manifest": manifest.digest,
            "samples": samples,
            "exclusions": manifest.exclusions,
            "dead_letters": manifest.dead_letters,
        }
        _answer(found, as_json=as_json)


@app.command()
def verify(
    uri: Annotated[str, typer.Argument(help="A prepared data set: a folder, or s3://...")],
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a data set; exit 1 with the list of damages."""
    with _errors():
        from pipelines import s3
        from pipelines.settings import Settings
        from sdn.data.verification import verify as find_damages

        with _local_copy(uri) as folder:
            if "://" in uri:
                s3.download(uri, folder, Settings().s3_endpoint)
            damages = find_damages(folder)
        if not as_json:
            for damage in damages:
                _say(f"damaged: {damage}")
            _say(f"{uri}: damaged, {len(damages)} found" if damages else f"{uri}: whole")
        _answer({"uri": uri, "damages": damages}, as_json=as_json)
        if damages:
            raise typer.Exit(1)


@app.command()
def generate(
    captions: Annotated[list[str], typer.Argument(help="What to draw, one image each.")],
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
        Path | None, typer.Option("--out", help="PNG file, or folder for several captions.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="For models with noise; kept with the image.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw an image of each caption with the champion of the registry, or another model."""
    with _errors():
        from pipelines.generation import draw, find_model, write_images

        _quiet()
        folder, name = find_model(model, store)
        images = write_images(draw(folder, captions), captions, out, model=name, seed=seed)
        if not as_json:
            for caption, path in zip(captions, images, strict=True):
                _say(f"{path}: {caption} ({name})")
        _answer({"model": name, "images": [str(path) for path in images]}, as_json=as_json)


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
    """Score a model on the test captions of its data set, baselines beside it."""
    with _errors():
        _quiet()
        from pipelines.console import Display
        from pipelines.flows.pipeline import parse_overrides
        from pipelines.generation import score_model

        found = score_model(model, store, parse_overrides(set_ or []), _scored)
        if not as_json:
            Display(to_stderr=False).scores(found["scores"], found["captions"])
        _answer(found, as_json=as_json)


@app.command()
def doctor(store: StoreOption = None, *, as_json: JsonOption = False) -> None:
    """What is installed, which device, which servers answer, what is missing and what to do."""
    with _errors():
        _quiet()
        from pipelines.diagnosis import diagnose

        checks = diagnose(store)
        if not as_json:
            _table(
                ("", "what", "found", "what to do"),
                [
                    ("ok" if c.ok else "!!", c.what, c.found, "" if c.ok else c.remedy)
                    for c in checks
                ],
            )
        _answer({"checks": [c.as_dict() for c in checks]}, as_json=as_json)
        if not all(c.ok for c in checks):
            raise typer.Exit(1)


@app.command()
def ui(
    store: StoreOption = None,
    mlflow_port: Annotated[int, typer.Option("--mlflow-port", min=1, max=65535)] = 5000,
    prefect_port: Annotated[int, typer.Option("--prefect-port", min=1, max=65535)] = 4200,
) -> None:
    """Open the pages of MLflow and Prefect on this machine, until Ctrl-C."""
    with _errors():
        _quiet()
        from pipelines.orphans import ended_with_this_process
        from pipelines.settings import Settings
        from pipelines.ui import serve

        settings = Settings() if store is None else Settings(store=store)
        with ended_with_this_process():
            status = serve(settings, mlflow_port, prefect_port, _say)
        raise typer.Exit(status)


@contextmanager
def _local_copy(place: str) -> Iterator[Path]:
    """The folder itself, or a temporary one that stands for a place on S3."""
    if "://" not in place:
        yield Path(place)
        return
    if not place.startswith("s3://"):
        raise ValueError(f"{place}: expected a folder or s3://bucket/prefix")
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _quiet() -> None:
    """Embedded parts stay silent and ask nobody outside; anything set already is kept."""
    for name, value in {
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
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


@contextmanager
def _errors() -> Iterator[None]:
    """An expected error is one clear line and exit 1, not a traceback."""
    try:
        yield
    except typer.Exit:  # a RuntimeError too
        raise
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        from pipelines.settings import Settings

        if Settings().traceback:
            raise
        _say(f"error: {error}", error=True)
        raise typer.Exit(1) from error


def _say(text: str, *, error: bool = False) -> None:
    typer.echo(text, err=error)


def _counting(count: int) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\r{count} records", nl=False, err=True)


def _scored(row: str) -> None:
    _say(f"scored: {row}", error=True)


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _answer(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))


if __name__ == "__main__":
    app()

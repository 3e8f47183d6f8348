"""`sdn play`: opening the models and serving the page until Ctrl-C."""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.terminal import StoreOption, expected_errors, quiet, say

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fastapi import FastAPI

    from pipelines.generation import FoundModel
    from pipelines.neighbours import Neighbours
    from sdn.data.dataset import DataSet

_GRACE_S = 1


def play(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="models:/NAME@champion, models:/NAME/VERSION or a model folder; may be repeated "
            "[default: the champion registered last, and the one before it]",
        ),
    ] = None,
    store: StoreOption = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 7860,
) -> None:
    """Open a page on this machine that draws a caption while one types, until Ctrl-C."""
    with expected_errors():
        quiet()
        try:
            from pipelines.ports import check_port

            check_port(port, what="the page", option="--port")
            _say("loading the libraries")
            serve(open_page(model or [], store, _say), port, say)
        except KeyboardInterrupt:
            pass
        # At once: nothing is left to write, and taking torch and MLflow down takes seconds.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def open_page(models: list[str], store: str | None, report: Callable[[str], None]) -> FastAPI:
    """The application with these models, or the champion and the one before it.

    Args:
        models: as `--model`; none for the default.
        store: in place of the configured one.
        report: told what is done meanwhile.

    Raises:
        RegistryError: no such model.
        ValueError, OSError: a model that cannot be opened.
    """
    from pipelines.neighbours import example_captions
    from pipelines.play import Shown, create_app
    from sdn.sampling import open_synthesizer

    shown: list[Shown] = []
    neighbours: dict[str, Neighbours | str] = {}
    opened: dict[str, Neighbours] = {}
    for found in find_models(models, store):
        report(f"loading {found.title}")
        synthesizer = open_synthesizer(found.folder)
        data = _data(found.folder, store)
        examples: list[str] = []
        if isinstance(data, str):
            neighbours[found.title] = data
        else:
            neighbours[found.title] = _neighbours(data, opened, report)
            try:
                examples = example_captions(data, synthesizer.max_chars)
            except (ValueError, OSError) as error:
                report(f"no captions to try: {error}")
        if isinstance(reason := neighbours[found.title], str):
            report(f"no training images beside {found.title}: {reason}")
        shown.append(Shown(model=found, synthesizer=synthesizer, examples=examples))
    return create_app(shown, neighbours)


def find_models(models: list[str], store: str | None) -> list[FoundModel]:
    """The models asked for, each once; by default the champion, and the one before if any.

    Raises:
        RegistryError: no such model.
    """
    from pipelines.generation import find_model

    wanted: list[str | None] = [*models] or [None]
    found = [find_model(model, store) for model in wanted]
    if not models:
        from pipelines.registry import DamagedModelError
        from pipelines.settings import Settings
        from pipelines.succession import PREVIOUS
        from pipelines.tracking import client

        settings = Settings() if store is None else Settings(store=store)
        name = found[0].name
        if PREVIOUS in client(settings).get_registered_model(name).aliases:
            try:
                found.append(find_model(f"models:/{name}@{PREVIOUS}", store))
            except DamagedModelError as error:  # the champion is shown all the same
                _say(str(error))
    return list({model.uri: model for model in found}.values())


def serve(app: FastAPI, port: int, report: Callable[[str], None]) -> None:
    """Serve the page on this machine alone, until Ctrl-C.

    Args:
        app: the application.
        port: of the page.
        report: told the address once it answers.

    Raises:
        PortError: the port was taken meanwhile.
        KeyboardInterrupt: it was ended so.
    """
    import uvicorn

    from pipelines.ports import HOST, check_port

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S
    )
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        check_port(port, what="the page", option="--port")
        listening.bind((HOST, port))
        listening.listen()  # from now on a browser waits instead of being refused
        report(f"page: http://{HOST}:{port}")
        report("Ctrl-C ends it")
        uvicorn.Server(config).run(sockets=[listening])


def _data(folder: Path, store: str | None) -> DataSet | str:
    """The model's data set, or why it cannot be had."""
    from pipelines.neighbours import data_of_model

    try:
        return data_of_model(folder, store)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        return str(error)


def _neighbours(
    data: DataSet, opened: dict[str, Neighbours], report: Callable[[str], None]
) -> Neighbours | str:
    """The training images of a data set, read once for all models of it, or why they cannot be."""
    from pipelines.neighbours import Neighbours

    version = data.manifest.digest
    if version not in opened:
        told = 0

        def progress(done: int, total: int) -> None:
            nonlocal told
            if done == total or done >= told + total // 4:
                told = done
                report(f"read {done:,} of {total:,} training images")

        try:
            opened[version] = Neighbours(data, progress)
        except (ValueError, OSError) as error:
            return str(error)
    return opened[version]


def _say(text: str) -> None:
    say(text, error=True)

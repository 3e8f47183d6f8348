"""`sdn ledger`: what trainings really consumed, from the command line."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.terminal import JsonOption, StoreOption, answer, expected_errors, quiet, say, table

if TYPE_CHECKING:
    from pipelines.worker import StageOrder
    from sdn.ledger import Audit


def ledger(
    training: Annotated[
        str | None, typer.Argument(help="A training, such as stage_two-0123456789abcdef; else all.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Follow the samples that trainings consumed: none lost, none twice; exit 1 if not so."""
    with expected_errors():
        quiet()
        from pipelines.settings import Settings

        settings = Settings() if store is None else Settings(store=store)
        found = {order.name: _audit(order) for order in _orders(settings, training)}
        if not as_json:
            headings = ("steps", "samples", "epochs", "attempts", "rolled back", "lost", "twice")
            table(("training", *headings), [(name, *_row(one)) for name, one in found.items()])
            for one in found.values():
                for problem in one.problems:
                    say(problem, error=True)
        answer({name: dataclasses.asdict(one) for name, one in found.items()}, as_json=as_json)
        if any(one.problems for one in found.values()):
            raise typer.Exit(1)


def _row(one: Audit) -> tuple[str, ...]:
    counts = (one.steps, one.samples, one.epochs, len(one.attempts))
    return tuple(map(str, (*counts, one.rolled_back, one.lost, one.twice)))


def _orders(settings: Any, wanted: str | None) -> list[StageOrder]:
    """The orders of the store's trainings, in the order of their names."""
    from pipelines.store import open_files, open_store
    from pipelines.supervising import read_order

    root = open_store(settings.store, settings.cache, settings.s3_endpoint).uri
    files = open_files(f"{root}/training", settings.cache, settings.s3_endpoint)
    names = sorted(
        info.name.partition("/")[0] for info in files.walk() if info.name.endswith("/order.json")
    )
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"no training {wanted} in {files.uri}; there are: {', '.join(names)}")
        names = [wanted]
    orders = [read_order(files.read(f"{name}/order.json")) for name in names]
    if settings.s3_endpoint is None:
        return orders
    # The server may have another address than when they were written.
    return [dataclasses.replace(order, endpoint=settings.s3_endpoint) for order in orders]


def _audit(order: StageOrder) -> Audit:
    from sdn.auditing import audit_training
    from sdn.checkpoint import Checkpoints

    newest = Checkpoints(order.place()).newest()
    return audit_training(
        order.stage,
        order.run_config(),
        order.dataset(),
        order.place(),
        0 if newest is None else newest.step,
    )

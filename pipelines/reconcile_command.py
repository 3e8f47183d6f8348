"""`sdn reconcile`: dead flow runs are found and brought to a true state."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.terminal import JsonOption, answer, expected_errors, quiet, say, table

if TYPE_CHECKING:
    from pipelines.settings import Settings


def reconcile(
    once: Annotated[
        bool,
        typer.Option(
            "--once", help="Look now, at runs of this machine only, instead of again and again."
        ),
    ] = False,
    every: Annotated[
        float | None,
        typer.Option("--every", min=1, help="Seconds between two looks [default: SDN_RECONCILE_S]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find flow runs whose process is gone: set a true state, free the slot, start them again."""
    with expected_errors():
        quiet()
        import logging

        from pipelines.flows.reconciling import reconcile_forever, reconcile_once
        from pipelines.settings import Settings

        settings = Settings()
        if not once:
            logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
            logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
            _wait_for_server(settings)
            reconcile_forever(settings, every)
        found = reconcile_once(settings)
        if not as_json and found:
            table(
                ("run", "is now", "why", "goes on as"),
                [(one.name, one.state, one.why, one.successor or "") for one in found],
            )
        if not found:
            say("no flow run of this machine has lost its process", error=as_json)
        answer({"settled": [dataclasses.asdict(one) for one in found]}, as_json=as_json)


def _wait_for_server(settings: Settings) -> None:
    """Wait for a server that starts: the first look is then at once, not one interval later."""
    from pipelines.prefect_api import PrefectApi

    if settings.prefect_api_url is None:
        return
    with PrefectApi.of(settings) as api:
        if not api.healthy():
            say("waiting for the Prefect server")
        while not api.healthy():
            time.sleep(0.5)

"""A flow run's record of itself on the server: it tells the dead from the slow.

It names the process and is renewed by a thread of its own, whatever the flow is at. Only the run
itself writes it.
"""

from __future__ import annotations

import contextvars
import dataclasses
import json
import logging
import os
import signal
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL

from pipelines.liveness import BEAT_EVERY_S, Pulse
from pipelines.notifying import forget
from pipelines.processes import ProcessName, this_process
from pipelines.tracking_place import public_uri, tracking_uri

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from uuid import UUID

    from pipelines.settings import Settings

logger = logging.getLogger(__name__)
PULSE = "sdn.pulse"
"""Label of a flow run with its record, as JSON."""
TRACKING = "sdn.tracking"
"""Label of a flow run with the address of its MLflow, without credentials."""


@contextmanager
def living(settings: Settings) -> Iterator[None]:
    """While the body of a flow runs, its record on the server is kept fresh.

    Where somebody has set the run to an end meanwhile, this process is ended, too: a run that a
    machine which slept was thought to have lost may go on elsewhere by now. Outside a flow nothing
    happens.

    Args:
        settings: of the run; they name its MLflow.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        yield
        return
    forget(settings, f"run-{context.flow_run.id}")  # a run that is tried again may fail again
    over = threading.Event()
    beating = _Beating(context.flow_run.id, public_uri(tracking_uri(settings)))
    # A server inside this process is gone with it, and so never looks at silence: once is enough.
    every_s = BEAT_EVERY_S if PREFECT_API_URL.value() else None
    thread = threading.Thread(
        target=contextvars.copy_context().run,
        args=(_beat_until, over, beating, every_s),
        name="pulse",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2)  # a server that hangs is not waited for


def _beat_until(over: threading.Event, beating: _Beating, every_s: float | None) -> None:
    """Renew the record until it is over, then take it back: a run that is suspended goes on as
    another process, of which the record of this one would say that it is gone.
    """
    _renew_until(over, beating, every_s)
    if over.is_set():
        with suppress(Exception):
            beating.close()


def _renew_until(over: threading.Event, beating: _Beating, every_s: float | None) -> None:
    while not over.is_set():
        try:
            ended = beating()
        except Exception as error:  # noqa: BLE001 (whatever the client or the server throws)
            logger.warning("the run's record could not be renewed: %s", _first_line(error))
            ended = None
        if over.is_set():
            return
        if ended is not None:
            logger.error("the run was set to %s from outside: its process ends", ended)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        over.wait(every_s)


class _Beating:
    """Writes the next record of a run."""

    def __init__(self, run: UUID, tracking: str) -> None:
        self._run, self._tracking = run, tracking
        self._process, self._beat = this_process(), 0

    def __call__(self) -> str | None:
        """Write it.

        Returns:
            The type of the run's state where that is an end, which only others can have set.
        """
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(self._run)
            self._beat += 1
            pulse = Pulse(process=self._process, run_count=run.run_count, beat=self._beat)
            labels = {PULSE: written(pulse), TRACKING: self._tracking}
            client.update_flow_run_labels(self._run, dict(labels))
        ended = run.state is not None and run.state.type.value in {"CRASHED", "CANCELLED"}
        return run.state.type.value if ended and run.state is not None else None

    def close(self) -> None:
        """Take the record back."""
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(self._run, {PULSE: ""})


def written(pulse: Pulse) -> str:
    """The record as a label holds it."""
    return json.dumps(dataclasses.asdict(pulse))


def read_pulse(labels: Mapping[str, Any]) -> Pulse | None:
    """The record of a run; None where there is none, or none that can be read."""
    try:
        values = json.loads(labels[PULSE])
        return Pulse(**{**values, "process": ProcessName(**values["process"])})
    except (KeyError, TypeError, ValueError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

"""The event that says that data have arrived, sent to a Prefect server."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import httpx
from prefect.client.orchestration import get_client

EVENT = "sdn.data.arrived"
"""What the deployment sdn-retrain is started by, see prefect.yaml."""


class EventError(RuntimeError):
    """The event could not be sent; the text says what to do."""


def arrival_event(
    landing: str, dataset: str = "", state: str | None = None, now: datetime | None = None
) -> dict[str, Any]:
    """The event as JSON values.

    Args:
        landing: where data have arrived.
        dataset: that grows from there; "" for the worker's configured one.
        state: what tells this arrival from others, such as a manifest's digest: the same one gives
            the same event however often it is sent. None makes each event its own.
        now: when it was.
    """
    number = uuid.uuid4() if state is None else uuid.uuid5(uuid.NAMESPACE_URL, f"{landing}|{state}")
    return {
        "id": str(number),
        "event": EVENT,
        "occurred": (now or datetime.now(UTC)).isoformat(),
        "resource": {"prefect.resource.id": f"sdn.landing.{landing}"},
        "payload": {"landing": landing, "dataset": dataset},
    }


def send(event: dict[str, Any]) -> None:
    """Post an event to the Prefect server that is configured (PREFECT_API_URL).

    Raises:
        EventError: it does not answer, or refuses the event.
    """
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[event]).raise_for_status()
    except (httpx.HTTPError, RuntimeError) as error:
        raise EventError(
            f"the event {EVENT} could not be sent ({error}); what arrived is in the data set, and "
            "the next run by the schedule goes on from there. Look at PREFECT_API_URL, and whether "
            "the server answers"
        ) from error

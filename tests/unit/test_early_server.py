"""Prefect's temporary server and what is said to it last."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

from prefect import settings
from prefect.events import Event, Resource
from prefect.events.clients import AssertingEventsClient
from prefect.events.worker import EventsWorker

from pipelines.flows.early_server import early_server


def test_all_is_said_while_the_server_is_there(monkeypatch, tmp_path):
    """Said at exit, to a server that was ended, each word is tried again for up to a minute."""
    server = SimpleNamespace(start=lambda: None)
    monkeypatch.setattr("prefect.server.api.server.SubprocessASGIServer", lambda: server)
    said = []

    async def slowly(self, event):
        await asyncio.sleep(0.5)  # as where others want the cores, too
        said.append(event.event)

    @asynccontextmanager
    async def to_nobody(self):
        yield

    monkeypatch.setattr(EventsWorker, "_lifespan", to_nobody)
    monkeypatch.setattr(EventsWorker, "_handle", slowly)
    changes = {
        settings.PREFECT_API_URL: None,
        settings.PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{tmp_path}/p.db",
        settings.PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True,
    }
    with settings.temporary_settings(changes), early_server():
        worker = EventsWorker.instance(AssertingEventsClient)
        for name in ("pending", "crashed"):
            resource = Resource({"prefect.resource.id": "prefect.task-run.x"})
            worker.send(Event(event=name, resource=resource))
    assert said == ["pending", "crashed"]

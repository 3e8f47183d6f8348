"""Prefect's temporary server, started before the flows are loaded: both take seconds, at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def early_server() -> Iterator[Callable[[], None]]:
    """Start the server that Prefect else starts at its first request, where no other is set.

    Yields:
        To be called before that request: waits until the server answers; raises RuntimeError if
        it does not within PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.
    """
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url or not settings.server.ephemeral.enabled:
        yield lambda: None
        return
    from prefect.server.api.server import SubprocessASGIServer

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(SubprocessASGIServer().start).result

"""Prefect's temporary server, started before the flows are loaded: both take seconds, at once."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipelines.left_locks import locks_given_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PATIENCE_S = 15.0
"""For what Prefect has to say to its server at the end."""


@contextmanager
def early_server() -> Iterator[Callable[[], None]]:
    """Start the server that Prefect else starts at its first request, where no other is set.

    Yields:
        To be called before that request: waits until the server answers; raises RuntimeError if
        it does not within PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.
    """
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, get_current_settings

    from pipelines.fresh_databases import PREFECT, lay, sqlite_file

    settings = get_current_settings()
    if settings.api.url or not settings.server.ephemeral.enabled:
        yield lambda: None
        return
    from prefect.server.api import server

    file = sqlite_file(PREFECT_API_DATABASE_CONNECTION_URL.value())
    if file is not None:
        lay(PREFECT, file)
    # Apart from this process's group: a Ctrl-C in the terminal, `timeout` and service managers
    # signal the whole group, and a run whose server is gone waits minutes for it before it ends.
    # Prefect ends the server with this process, and `pipelines.orphans` where this one is killed.
    apart: Any = SimpleNamespace(**vars(subprocess))
    apart.Popen = partial(subprocess.Popen, start_new_session=True)
    server.subprocess = apart  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:
        try:
            with locks_given_back():  # the pool's thread and Prefect's are waited for
                yield pool.submit(server.SubprocessASGIServer().start).result
        finally:
            _tell_all()


def _tell_all() -> None:
    """Wait until Prefect has told the server what it still has to say, while that is there.

    It does so in threads, and at exit tries each word to a server that is gone for 8 s to a minute.
    """
    from prefect.events.worker import EventsWorker

    # That of logs as well: Prefect keeps all its services in one table.
    EventsWorker.drain_all(timeout=_PATIENCE_S)

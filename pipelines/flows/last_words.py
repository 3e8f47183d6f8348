"""A command whose work was interrupted does not wait for Prefect for ever."""

from __future__ import annotations

import faulthandler
import os
import sys
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING

from pipelines.flows.stages import terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE_S = 30.0
"""Twice what Prefect's threads get for their last words (`early_server`)."""


@contextmanager
def ended_in_time() -> Iterator[None]:
    """Once what is inside was interrupted, its process has half a minute to end as well.

    It was interrupted where what leaves it is no Exception: by a Ctrl-C, a SIGTERM. The ranks have
    had their time for a last checkpoint by then; Ray is to end, and Prefect to be told. A server
    that is gone holds a process for minutes by Prefect's retries, and a thread that waits for what
    never comes holds it for good. After that time the stacks of all threads go to standard error,
    and the process ends; what it had started, `pipelines.orphans` ends. With one such block around
    another the time begins anew at the outer one. In a worker nothing happens: Prefect sees to its
    processes itself.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException:
        if terminal.get() is not None:
            _INTERRUPTED.set()
            _begin()
        raise


@contextmanager
def not_counted() -> Iterator[None]:
    """What is done inside may take its time, which begins anew after it."""
    if not _INTERRUPTED.is_set():
        yield
        return
    faulthandler.cancel_dump_traceback_later()
    try:
        yield
    finally:
        _begin()


def _begin() -> None:
    # By a thread that needs no Python, and so nothing that another might hold.
    out = sys.__stderr__ or open(os.devnull, "w")  # noqa: PTH123, SIM115 (kept until then)
    faulthandler.dump_traceback_later(_PATIENCE_S, exit=True, file=out)


_INTERRUPTED = Event()
"""Whether this process is to end in time."""

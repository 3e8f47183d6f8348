"""A command that a signal has ended comes to its end, also where Prefect cannot be told of it."""

from __future__ import annotations

import faulthandler
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines.flows.stages import terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE_S = 30.0
"""Twice what Prefect's threads get for their last words (`early_server`)."""


@contextmanager
def ended_in_time() -> Iterator[None]:
    """Once a signal has ended what is inside, its process has half a minute to end as well.

    All work has written down where it is by then; Ray is to end, and Prefect to be told. A server
    that is gone holds a process for minutes by Prefect's retries, and a thread that waits for what
    never comes holds it for good. After that time the stacks of all threads go to standard error,
    and the process ends; what it had started, `pipelines.orphans` ends. In a worker nothing
    happens: Prefect sees to its processes itself.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException:
        if terminal.get() is not None:
            # By a thread without Python, which nothing in this process can hold.
            out = sys.__stderr__ or open(os.devnull, "w")  # noqa: PTH123, SIM115 (kept until then)
            faulthandler.dump_traceback_later(_PATIENCE_S, exit=True, file=out)
        raise

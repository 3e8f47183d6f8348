"""Ending processes that may not be children of this one, each by its own id."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable


def runs(process: psutil.Process) -> bool:
    """Whether it does; a dead child that nobody has collected yet does not.

    A process that has the id of another, ended one is not taken for it.
    """
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end(processes: Iterable[psutil.Process], grace_s: float) -> list[psutil.Process]:
    """SIGTERM to each, and SIGKILL to those that still run after `grace_s` seconds.

    With no grace there is no SIGTERM.

    Returns:
        Those that had to be killed.
    """
    left = [process for process in processes if runs(process)]
    for process in left if grace_s > 0 else []:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    until = time.monotonic() + grace_s
    while (left := [process for process in left if runs(process)]) and time.monotonic() < until:
        time.sleep(0.05)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    killed = time.monotonic() + 5
    while any(runs(process) for process in left) and time.monotonic() < killed:
        time.sleep(0.02)
    return left

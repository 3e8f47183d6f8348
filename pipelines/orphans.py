"""Ends what a run started if the run itself is killed.

Prefect's embedded server and Ray's agents outlive a parent that dies by SIGKILL. A small companion
process watches the run's descendants, and when the run is gone it ends those that are left, each
by its own process id.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOOK_EVERY_S = 1.0
_GRACE_S = 5.0


@contextmanager
def ended_with_this_process() -> Iterator[None]:
    """Everything started inside is ended when this process ends, however it ends."""
    companion = subprocess.Popen(  # noqa: S603 (our own module)
        [sys.executable, "-m", "pipelines.orphans", str(os.getpid())],
        stdin=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C in the terminal is not meant for it
    )
    try:
        yield
    finally:
        assert companion.stdin is not None
        companion.stdin.close()
        companion.wait()


def watch(pid: int) -> None:
    """Remember the descendants of `pid` until our standard input closes, then end the survivors."""
    known: dict[int, psutil.Process] = {}
    while not select.select([sys.stdin], [], [], _LOOK_EVERY_S)[0]:
        try:
            for process in psutil.Process(pid).children(recursive=True):
                if process.pid != os.getpid():
                    known[process.pid] = process
        except psutil.NoSuchProcess:
            break
    # is_running compares start times, so a reused process id is not mistaken for ours.
    left = [process for process in known.values() if process.is_running()]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    until = time.monotonic() + _GRACE_S
    while (left := [process for process in left if _runs(process)]) and time.monotonic() < until:
        time.sleep(0.05)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _runs(process: psutil.Process) -> bool:
    """Whether it does; a dead child that the waiting run has not collected yet does not."""
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    watch(int(sys.argv[1]))

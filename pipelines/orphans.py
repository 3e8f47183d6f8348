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
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

from pipelines.ending import end

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
    end(known.values(), _GRACE_S)


if __name__ == "__main__":
    watch(int(sys.argv[1]))

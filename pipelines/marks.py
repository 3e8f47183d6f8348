"""Which processes are a local stack's: a mark in their environment, inherited by all they start.

So whatever was killed, and whoever has become a process's parent since, what is left is found.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FOLDER, PART = "SDN_PART_OF", "SDN_PART"
"""Variables of the mark: the stack's folder, and which part of it."""
_FLOW_RUN = "PREFECT__FLOW_RUN_ID"


@dataclass(frozen=True)
class Marked:
    """A process of a stack."""

    process: psutil.Process
    folder: str
    part: str
    flow_run: str | None
    """Id of the flow run that it does, or was started by."""

    def __str__(self) -> str:
        return f"{self.part} (pid {self.process.pid})"


def mark(folder: Path, part: str) -> dict[str, str]:
    """What makes a process, and all it starts, a part of the stack in a folder."""
    return {FOLDER: str(folder), PART: part}


def mark_of(process: psutil.Process) -> Marked | None:
    """A process's mark; None where it has none, is gone, or is somebody else's."""
    try:
        found = process.environ()
    except (psutil.Error, OSError):
        return None
    if FOLDER not in found:
        return None
    return Marked(process, found[FOLDER], found.get(PART, ""), found.get(_FLOW_RUN))


def marked(folder: Path) -> list[Marked]:
    """All processes of the stack in a folder, but for this one and those that started it.

    A process that has overwritten its environment, as Ray's workers do to change their name, is
    known by the nearest of those above it that has a mark: a flow run before the worker over it.
    """
    mine = psutil.Process()
    spared = {mine.pid, *(parent.pid for parent in mine.parents())}
    processes, parents, marks = {}, {}, {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            parents[process.pid] = process.ppid()
            processes[process.pid] = process
            marks[process.pid] = mark_of(process)
    found = []
    for pid, process in sorted(processes.items()):
        nearest = _nearest(pid, marks, parents)
        if nearest is None or nearest.folder != str(folder) or pid in spared:
            continue
        if _alive(process):
            found.append(replace(nearest, process=process))
    return found


def _nearest(
    pid: int, marks: Mapping[int, Marked | None], parents: Mapping[int, int]
) -> Marked | None:
    """The mark of a process, else of the nearest one above it that has one."""
    seen: set[int] = set()
    while pid in parents and pid not in seen:
        seen.add(pid)  # ids may be given anew while they are read: no circle is followed
        if (one := marks.get(pid)) is not None:
            return one
        pid = parents[pid]
    return None


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False

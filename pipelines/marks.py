"""Which processes are a local stack's: a mark in their environment, inherited by all they start.

So whatever was killed, and whoever has become a process's parent since, what is left is found.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator
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
    known by its parent.
    """
    mine = psutil.Process()
    spared = {mine.pid, *(parent.pid for parent in mine.parents())}
    found: dict[int, Marked] = {}
    for process in psutil.process_iter():
        one = mark_of(process)
        if one is not None and one.folder == str(folder):
            found[process.pid] = one
    for one in list(found.values()):
        for child in _below(one.process):
            found.setdefault(child.pid, Marked(child, one.folder, one.part, one.flow_run))
    return [one for pid, one in sorted(found.items()) if pid not in spared and _alive(one.process)]


def _below(process: psutil.Process) -> Iterator[psutil.Process]:
    with suppress(psutil.Error):
        yield from process.children(recursive=True)


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False

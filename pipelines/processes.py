"""Which process this is, and whether one that was written down still lives.

A process id alone says little: it is used again, another machine has the same, and so has another
container of this machine. So a process is named by its machine, that machine's boot, its space of
process ids, its id and the moment it started, counted since the boot: the clock may jump.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

_MACHINE_IDS = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Life(StrEnum):
    """What can be said of a process from here."""

    ALIVE = "alive"
    GONE = "gone"
    """Looked for where it was, and not there."""
    REBOOTED = "rebooted"
    """Its machine seems to be this one, which was started again since."""
    ELSEWHERE = "elsewhere"
    """On a machine, or in a container, that cannot be looked into from here."""


@dataclass(frozen=True, kw_only=True)
class ProcessName:
    """One process among all there are and were."""

    host: str
    """For people."""
    machine: str
    boot: str
    space: str
    """Of process ids: containers have their own."""
    pid: int
    started: str
    """Ticks since the boot where the system counts so, else seconds since 1970."""


def this_process() -> ProcessName:
    """The name of the process that asks."""
    pid = os.getpid()
    started = _started(pid)
    assert started is not None, "this process runs"
    machine, boot, space = _here()
    return ProcessName(
        host=platform.node(), machine=machine, boot=boot, space=space, pid=pid, started=started
    )


def life(process: ProcessName) -> Life:
    """Whether it lives, as far as that can be seen from here; a dead child that nobody has
    collected yet is gone.
    """
    machine, boot, space = _here()
    if process.machine != machine:
        return Life.ELSEWHERE
    if process.boot != boot:
        return Life.REBOOTED
    if process.space != space:
        return Life.ELSEWHERE
    try:
        return Life.ALIVE if _started(process.pid) == process.started else Life.GONE
    except PermissionError:  # another account's, on a system that hides those
        return Life.ELSEWHERE


def _here() -> tuple[str, str, str]:
    """Machine, boot and space of process ids."""
    found = [path.read_text().strip() for path in _MACHINE_IDS if path.is_file()]
    # An image that is copied brings its machine-id along; the host's name tells copies apart. The
    # id itself is no business of others, so a digest of it goes out.
    named = f"{platform.node()}|{found[0] if found else ''}"
    machine = hashlib.sha256(named.encode()).hexdigest()[:16]
    try:
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        boot = str(int(psutil.boot_time()))
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return machine, boot, space


def _started(pid: int) -> str | None:
    """When the process of this id started; None where there is none that still runs.

    Raises:
        PermissionError: there is one, and no more can be seen of it.
    """
    if not Path("/proc/self/stat").exists():
        return _started_without_proc(pid)
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        try:
            os.kill(pid, 0)  # sends nothing
        except ProcessLookupError:
            return None
        raise PermissionError(pid) from None
    fields = text.rpartition(")")[2].split()  # a program's name may hold anything
    return None if fields[0] in {"Z", "X"} else fields[19]


def _started_without_proc(pid: int) -> str | None:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied as error:
        raise PermissionError(pid) from error

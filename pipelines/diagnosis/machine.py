"""What this machine has: device, cores, memory, disk, descriptors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cluster import cores
from pipelines.diagnosis.check import Check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.settings import Settings

_FREE_GIB = 5
_MEMORY_GIB = 6
_SHARED_GIB = 0.3
_DESCRIPTORS = 4096
_SHM = Path("/dev/shm")  # noqa: S108 (only looked at)


def look_at_device(settings: Settings) -> Iterator[Check]:
    """What training computes on."""
    import torch

    from sdn.training import choose_precision

    if torch.cuda.is_available():
        found = f"GPU {torch.cuda.get_device_name()}, bf16"
    else:
        precision = choose_precision("auto", torch.device("cpu"))
        found = f"CPU, {cores(settings)} cores, {precision}"
    yield Check(ok=True, what="device", found=found)


def look_at_machine(settings: Settings) -> Iterator[Check]:
    """Memory, disk, shared memory, cores and file descriptors."""
    import psutil

    memory = psutil.virtual_memory().available / 2**30
    yield Check(
        ok=memory >= _MEMORY_GIB,
        what="memory",
        found=f"{memory:.1f} GiB free",
        remedy=f"the embedded recipe needs {_MEMORY_GIB} GiB; end other programs",
    )
    place = settings.local
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    yield Check(
        ok=free >= _FREE_GIB,
        what="disk",
        found=f"{free:.0f} GiB free at {place}",
        remedy="make room, or set SDN_STORE to another disk",
    )
    if _SHM.is_dir():
        shared = shutil.disk_usage(_SHM).free / 2**30
        yield Check(
            ok=shared > _SHARED_GIB,
            what="shared memory",
            found=f"{shared:.1f} GiB free at {_SHM}",
            remedy=f"Ray's object store needs {_SHARED_GIB} GiB; in a container raise --shm-size",
        )
    there = os.cpu_count() or 1
    yield Check(
        ok=cores(settings) <= there,
        what="cores",
        found=f"{cores(settings)} to be used, {there} are there",
        remedy=f"set SDN_CPUS to {there} or less: ranks that share a core wait for each other",
    )
    yield from _descriptors()


def _descriptors() -> Iterator[Check]:
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # Ray raises the lower one by itself
    unlimited = most == resource.RLIM_INFINITY
    yield Check(
        ok=unlimited or most >= _DESCRIPTORS,
        what="open files",
        found="no limit" if unlimited else f"at most {most} (ulimit -Hn)",
        remedy=f"Ray and the servers need {_DESCRIPTORS}: raise nofile in "
        "/etc/security/limits.conf, LimitNOFILE of the unit, or --ulimit nofile of the container",
    )

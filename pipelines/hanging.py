"""Ranks that hang: their stacks from outside, and signals to them, on whatever node they are."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipelines.worker import stack_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_PATIENCE_S = 20


def stacks_of(ranks: Iterable[dict[str, Any]]) -> str:
    """The stacks of all threads of each rank, or what is known of a process that gives none.

    Args:
        ranks: `rank`, `pid` and `node` of each.
    """
    parts = []
    for one in sorted(ranks, key=lambda one: one["rank"]):
        parts.append(f"rank {one['rank']}, process {one['pid']}, node {one['node']}")
        parts.append(_there(one, process_stacks, one["pid"]) or "nothing could be learnt of it")
    return "\n".join(parts)


def end_ranks(ranks: Iterable[dict[str, Any]], number: signal.Signals) -> None:
    """Send a signal to the process of each rank."""
    for one in ranks:
        _there(one, send, one["pid"], int(number))


def send(pid: int, number: int) -> str:
    """Send a signal to a process of this node, if it is there still."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    return "sent"


def process_stacks(pid: int) -> str:
    """What a process of this node does: its state, and the stacks of its threads."""
    try:
        state = f"state: {psutil.Process(pid).status()}"
    except psutil.NoSuchProcess:
        return "it is gone"
    if state.endswith(psutil.STATUS_STOPPED):
        state += " (by a signal such as SIGSTOP; SIGCONT would let it go on)"
    own = stack_file(pid)
    if own.is_file() and (text := own.read_text().strip()):
        return f"{state}\n{text}"
    # py-spy comes with ray[default]; whether it may look into another process is the system's rule.
    command = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    try:
        looked = subprocess.run(  # noqa: S603 (our own arguments)
            [command, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{state}\nno stack: {error}"
    return f"{state}\n{(looked.stdout or looked.stderr).strip()}"


def _there(one: dict[str, Any], function: Callable[..., str], *values: Any) -> str | None:
    """Call on the rank's node; None where that node does not answer."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if one["node"] == ray.get_runtime_context().get_node_id():
        return function(*values)
    strategy = NodeAffinitySchedulingStrategy(one["node"], soft=False)
    task = ray.remote(function).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)
    try:
        found: str = ray.get(task.remote(*values), timeout=_PATIENCE_S)
    except (RayError, GetTimeoutError):
        return None
    return found

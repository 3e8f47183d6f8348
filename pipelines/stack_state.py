"""What a local stack is doing: each part's process, memory and health, and what was left behind."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from math import inf
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from pipelines.flows import RECONCILER as RECONCILER_WORD
from pipelines.marks import Marked, marked
from pipelines.ports import listens
from pipelines.prefect_api import PrefectApi, PrefectApiError
from pipelines.stack import MLFLOW, POOL, PREFECT, RAY, RECONCILER, S3, WORKER

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.keeping import KeptState
    from pipelines.settings import Settings
    from pipelines.stack import Plan, Stack

HEALTHY, STARTING, UNHEALTHY, GONE = "healthy", "starting", "not healthy", "gone"
_TIMEOUT_S = 3.0
_LOOK_S = 30.0
"""What a look of the reconciler may take where the server is busy."""


@dataclass(frozen=True, kw_only=True)
class PartState:
    """One part."""

    name: str
    state: str
    """healthy, starting, not healthy (it runs, but does not answer as it should), gone."""
    pid: int | None
    port: int | None
    memory_mib: float
    """Of its processes, what they share divided among those that share it."""
    url: str
    why: str
    """Of what is not healthy."""

    @property
    def healthy(self) -> bool:
        """Whether it does what it is for."""
        return self.state == HEALTHY


@dataclass(frozen=True, kw_only=True)
class StackState:
    """The whole stack at one moment."""

    kept: bool
    """Whether its supervisor runs."""
    parts: tuple[PartState, ...]
    processes: tuple[Marked, ...]

    @property
    def healthy(self) -> bool:
        """Whether all parts are, and are kept running."""
        return self.kept and all(part.healthy for part in self.parts)

    @property
    def flow_runs(self) -> dict[str, list[Marked]]:
        """Processes of each flow run that is being done, by its id."""
        return flow_runs(self.processes)

    @property
    def memory_mib(self) -> float:
        """Of all but flow runs."""
        return memory_mib([one for one in self.processes if one.flow_run is None])

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "healthy": self.healthy,
            "supervisor": self.kept,
            "parts": [vars(part) for part in self.parts],
            "memory_mib": self.memory_mib,
            "flow_runs": sorted(self.flow_runs),
            "processes": len(self.processes),
        }


def flow_runs(processes: tuple[Marked, ...] | list[Marked]) -> dict[str, list[Marked]]:
    """Processes of each flow run, by its id."""
    found: dict[str, list[Marked]] = {}
    for one in processes:
        if one.flow_run is not None:
            found.setdefault(one.flow_run, []).append(one)
    return found


def memory_mib(processes: list[Marked]) -> float:
    """What processes take together; shared pages count once (Linux), or not at all elsewhere."""
    total = 0
    for one in processes:
        with suppress(psutil.Error):
            info = one.process.memory_full_info()
            total += getattr(info, "pss", info.uss)
    return round(total / 2**20, 1)


def look(stack: Stack, plan: Plan, settings: Settings) -> StackState:
    """Ask supervisor, every part and the machine."""
    kept = stack.keeper.states()
    processes = marked(stack.folder)
    probe, parts = Probe(plan, settings), []
    for name in plan.parts:
        mine = [one for one in processes if one.part == name and one.flow_run is None]
        said = (kept or {}).get(name)
        pid = said.pid if said is not None and said.pid else _oldest(mine)
        why = probe.unhealthy(name, pid)
        parts.append(
            PartState(
                name=name,
                state=_state(why, pid, said),
                pid=pid,
                port=plan.ports.of(name),
                memory_mib=memory_mib(mine),
                url=plan.urls.get(name, ""),
                why=f"{why}; supervisor: {said.state}, {said.why}" if said and why else why,
            )
        )
    return StackState(kept=kept is not None, parts=tuple(parts), processes=tuple(processes))


def _state(why: str, pid: int | None, said: KeptState | None) -> str:
    if pid is None:
        return STARTING if said is not None and said.state == "BACKOFF" else GONE
    if not why:
        return HEALTHY
    return STARTING if said is not None and said.state == "STARTING" else UNHEALTHY


def _oldest(processes: list[Marked]) -> int | None:
    """Which of a part's processes began it."""
    began = {}
    for one in processes:
        with suppress(psutil.Error):
            began[one.process.pid] = one.process.create_time()
    return min(began, key=lambda pid: began[pid]) if began else None


class Probe:
    """Asks the parts whether they are healthy."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self._plan = plan
        # Without certificates: they take 70 ms of a core to load, and nothing here has one.
        self._client = httpx.Client(timeout=_TIMEOUT_S, verify=False)  # noqa: S501
        self._reconcile_s = settings.reconcile_s
        self._prefect = PrefectApi(f"{plan.urls[PREFECT]}/api", settings.credentials)

    def unhealthy(self, name: str, pid: int | None) -> str:
        """Why a part is not healthy; empty where it is."""
        if pid is None:
            return "no process"
        if name == RECONCILER:
            return self._reconciler_silent(pid)
        if name == WORKER:
            return self._worker_silent(pid)
        if name == RAY and not listens(self._plan.ports.ray):
            return f"nothing listens on port {self._plan.ports.ray}"
        pages = {S3: "/healthz", MLFLOW: "/health", PREFECT: "/api/health", RAY: "/"}
        url = self._plan.urls[name] + pages[name]
        try:
            answer = self._client.get(url)
        except httpx.HTTPError as error:
            return f"{url}: {error or type(error).__name__}"
        # Ray's dashboard asks everybody for the token: that is an answer, too.
        asks = name == RAY and answer.status_code < httpx.codes.INTERNAL_SERVER_ERROR
        return "" if answer.is_success or asks else f"{url} answered {answer.status_code}"

    def _worker_silent(self, pid: int) -> str:
        """Why a worker is not one that Prefect's server hears; empty where it is."""

        def heard() -> list[str]:
            path = f"work_pools/{POOL}/workers/filter"
            found = self._prefect.ask("POST", path, {}, absent=[])
            return [one["last_heartbeat_time"] for one in found if one["status"] == "ONLINE"]

        return self._silent(pid, heard)

    def _reconciler_silent(self, pid: int) -> str:
        """Why a reconciler is not one that has looked lately; empty where it is."""

        def heard() -> list[str]:
            found = self._prefect.ask("GET", f"variables/name/{RECONCILER_WORD}", absent=None)
            return [] if found is None else [found["updated"]]

        return self._silent(pid, heard, 3 * self._reconcile_s + _LOOK_S)

    def _silent(self, pid: int, heard: Callable[[], list[str]], within_s: float = inf) -> str:
        """Why a process is none that Prefect has heard of lately; empty where it is.

        Args:
            pid: of the process.
            heard: asks Prefect when it heard of any of the kind; ISO times.
            within_s: how long ago it may have been.
        """
        try:
            # Since its process began: Prefect remembers those of earlier days.
            since = max(psutil.Process(pid).create_time(), time.time() - within_s)
            if any(datetime.fromisoformat(at).timestamp() >= since for at in heard()):
                return ""
        except (httpx.HTTPError, PrefectApiError, psutil.Error) as error:
            return f"Prefect cannot be asked for it: {error}"
        return "Prefect has not heard of it yet"

"""Brings flow runs whose process is gone to a true state, and lets what can go on go on.

It runs as a process of its own, never as a deployed flow: the worker that would run that may be
what died. It asks the Prefect server alone, needs no other process alive, and any number of them,
on any number of machines, may run at once: the server creates one successor of a run, whoever asks.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Crashed

from pipelines.flows import RECONCILER
from pipelines.flows.notices import settings_of, tell_of_run
from pipelines.flows.pulse import TRACKING, read_pulse
from pipelines.liveness import CLAIMING, Claim, Limits, Moment, Verdict, Watch
from pipelines.processes import Life, life
from pipelines.tracking_place import public_uri, tracking_uri

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

    from pipelines.settings import Settings

logger = logging.getLogger(__name__)
OURS = "sdn-"
"""How the names of our flows begin; nobody else's runs are looked at."""
GO_ON = ("sdn-pipeline", "sdn-retrain", "sdn-tune", "sdn-evaluate")
"""Flows that may be started again: they do nothing twice. A second rollback undoes the first."""
REVIVAL, AFTER = "sdn.revival", "sdn.after"
"""Labels of a run that goes on with the work of a dead one: how many died before, and which."""
_PAGE = 200
_ONCE_S = 2.0
_OWED_LOOKS = 360
"""Looks for which what could not be done at once is tried again."""


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A dead run that was brought to a true state."""

    run: str
    name: str
    state: str
    """CRASHED, or CANCELLED where that was asked for."""
    why: str
    successor: str | None
    """Id of the run that goes on."""


@dataclass(kw_only=True)
class _Owed:
    """What is still to be done for a run that was settled."""

    what: str
    do: Callable[[], object]
    looks: int = _OWED_LOOKS


class NoServerError(RuntimeError):
    """There is no Prefect server to ask; the text says what to do."""


def reconcile_forever(settings: Settings, every_s: float | None = None) -> None:
    """Look for dead runs until the process is ended.

    Args:
        settings: of the machine.
        every_s: seconds between two looks; `settings.reconcile_s` by default.

    Raises:
        NoServerError: none is configured.
    """
    every_s = every_s or settings.reconcile_s
    reconciler = Reconciler(settings, limits(settings, every_s))
    logger.info("looking for dead flow runs every %.0f s", every_s)
    while True:
        reconciler.look()
        time.sleep(every_s)


def reconcile_once(settings: Settings) -> list[Settled]:
    """Two looks, a moment apart: finds runs of this machine whose process is gone, and no others.

    Raises:
        NoServerError: none is configured, or it does not answer.
    """
    reconciler = Reconciler(settings, limits(settings, _ONCE_S))
    reconciler.look(patient=False)
    time.sleep(_ONCE_S)
    return reconciler.look(patient=False)


def limits(settings: Settings, every_s: float) -> Limits:
    """What counts as evidence for a reconciler that looks this often."""
    # A look that finds the server busy may take half a minute.
    return Limits(silence_s=settings.silence_s, gap_s=3 * every_s + 30)


class Reconciler:
    """Looks at the runs of a server again and again.

    Args:
        settings: of the machine.
        limits: what counts as evidence.

    Raises:
        NoServerError: none is configured.
    """

    def __init__(self, settings: Settings, limits: Limits | None = None) -> None:
        if not PREFECT_API_URL.value():
            raise NoServerError(
                "PREFECT_API_URL is not set: expected the address of a Prefect server, such as "
                "http://127.0.0.1:4200/api, whose runs are to be looked at"
            )
        self._settings = settings
        self._watch = Watch(limits)
        self._owed: list[_Owed] = []

    def look(self, *, patient: bool = True) -> list[Settled]:
        """One look: who is dead is brought to a true state.

        Args:
            patient: whether a server that does not answer is no error.

        Raises:
            NoServerError: it does not answer, and `patient` is False.
        """
        moment = Moment(steady_s=time.monotonic(), wall_s=time.time())
        try:
            # The next look is the other try; the client's own take a minute.
            with (
                temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}),
                get_client(sync_client=True) as client,
            ):
                verdicts = self._watch.look(moment, claims(client))
                _say_alive(client)
                settled = [self._settle(client, verdict) for verdict in verdicts]
                self._pay()
        except Exception as error:  # whatever the client or the server throws
            self._watch.look(moment, None)
            if not patient:
                raise NoServerError(
                    f"the Prefect server at {public_uri(str(PREFECT_API_URL.value()))} does not "
                    f"answer ({type(error).__name__}): check PREFECT_API_URL, and `sdn doctor`"
                ) from error
            logger.warning("the Prefect server cannot be asked: %s", type(error).__name__)
            return []
        return [one for one in settled if one is not None]

    def _settle(self, client: SyncPrefectClient, verdict: Verdict) -> Settled | None:
        """Bring one dead run to a true state; None where it changed in the last moment."""
        claim = verdict.claim
        run = client.read_flow_run(UUID(claim.run))
        if run.state is None or str(run.state.id) != claim.state_id:
            return None
        why = f"the run is dead: {verdict.why}"
        cancelled = claim.state == "CANCELLING"
        state: State[None] = Cancelled(message=why) if cancelled else Crashed(message=why)
        client.set_flow_run_state(run.id, state)  # the server frees the slot with it
        after = client.read_flow_run(run.id).state
        if after is None or not after.is_final():
            logger.warning("run %s could not be set to %s", run.name, state.type.value)
            return None
        logger.warning("%s is %s: %s", run.name, after.type.value, why)
        successor = None if cancelled else self._revive(run)
        settled = Settled(
            run=claim.run, name=run.name, state=after.type.value, why=why, successor=successor
        )
        what = f"what {run.name} left in MLflow"
        self._owed += [
            _Owed(what=f"the tasks of {run.name}", do=partial(_settle_tasks, run.id, why)),
            _Owed(what=what, do=partial(self._settle_mlflow, run)),
        ]
        if not cancelled:
            self._tell(client, run, settled)
        return settled

    def _pay(self) -> None:
        """Do what is owed; what fails is tried again at the next looks."""
        owed, self._owed = self._owed, []
        for one in owed:
            try:
                one.do()
            except Exception as error:  # noqa: BLE001 (a server of others that does not answer)
                logger.warning("%s could not be settled yet: %s", one.what, type(error).__name__)
                one.looks -= 1
                if one.looks > 0:
                    self._owed.append(one)

    def _settle_mlflow(self, run: FlowRun) -> None:
        """End what the run has left RUNNING in MLflow."""
        settings = self._settings_at(run)
        if settings is not None:
            from pipelines.tracking import end_left  # loads MLflow, 170 MiB that wait for trouble

            end_left(settings, str(run.id))

    def _settings_at(self, run: FlowRun) -> Settings | None:
        """Settings with the MLflow of a run; None where that cannot be reached from here."""
        place = run.labels.get(TRACKING)
        if not isinstance(place, str):
            return None
        own = tracking_uri(self._settings)
        uri = own if public_uri(own) == place else place
        file = uri.removeprefix("sqlite:///")
        if file != uri and not Path(file).is_file():  # on another machine; not to be made here
            return None
        return self._settings.model_copy(update={"tracking_uri": uri})

    def _revive(self, run: FlowRun) -> str | None:
        """Start the run again, once, if that is safe and was not done too often.

        Returns:
            Id of the run that goes on; None where none does, or the server could not be asked now.
        """
        try:
            return _successor(run, self._settings.revivals)
        except PrefectHTTPStatusError as error:
            if error.response.is_client_error:  # no such deployment now, or other parameters
                logger.warning("%s could not be started again: %s", run.name, error)
                return None
            failed: Exception = error
        except Exception as error:  # noqa: BLE001 (as in `_pay`)
            failed = error
        logger.warning("%s could not be started again yet: %s", run.name, failed)
        again = partial(_successor, run, self._settings.revivals)
        self._owed.append(_Owed(what=f"the successor of {run.name}", do=again))
        return None

    def _tell(self, client: SyncPrefectClient, run: FlowRun, settled: Settled) -> None:
        """Notify of a run that died."""
        flow = client.read_flow(run.flow_id).name
        text = f"{settled.why}. " + (
            f"Run {settled.successor} goes on with its work."
            if settled.successor
            else "It is not started again by itself."
        )
        settings = settings_of(run.parameters)
        if not settings.local.is_dir():  # a folder of another machine
            settings = self._settings
        tell_of_run(settings, run.id, f"{flow} crashed: {run.name}", text)


def _successor(run: FlowRun, revivals: int) -> str | None:
    """The run that goes on with the work of a dead one, made once; None where none is to be."""
    count = run.labels.get(REVIVAL, 0)
    died = int(count) if isinstance(count, (int, str)) else 0
    if run.deployment_id is None or run.parent_task_run_id is not None or died >= revivals:
        return None
    with get_client(sync_client=True) as client:
        if client.read_flow(run.flow_id).name not in GO_ON:
            return None
        made = client.create_flow_run_from_deployment(
            run.deployment_id,
            parameters=run.parameters,
            name=f"{run.name.partition(' again')[0]} again {died + 1}",
            tags=run.tags,
            # Whoever else finds the same run dead gets the same successor.
            idempotency_key=f"sdn-after-{run.id}",
            work_queue_name=run.work_queue_name,
            job_variables=run.job_variables,
            labels={REVIVAL: died + 1, AFTER: str(run.id)},
        )
    return str(made.id)


def claims(client: SyncPrefectClient) -> list[Claim]:
    """Every run of our flows that claims to run, and what is known of its process and worker."""
    like = FlowFilter(name=FlowFilterName(like_=OURS))
    flows = {one.id for one in client.read_flows(flow_filter=like) if one.name.startswith(OURS)}
    state = FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType[name] for name in CLAIMING])
    )
    runs: list[FlowRun] = []
    while True:
        page = client.read_flow_runs(
            flow_filter=like,
            flow_run_filter=FlowRunFilter(state=state),
            limit=_PAGE,
            offset=len(runs),
        )
        runs += page
        if len(page) < _PAGE:
            break
    workers = _Workers(client)
    found = []
    for run in runs:
        pulse = read_pulse(run.labels)
        seen = Life.ELSEWHERE if pulse is None else life(pulse.process)
        if seen in {Life.GONE, Life.REBOOTED}:
            # The state that was read may be older than what was seen of the process just now.
            run = client.read_flow_run(run.id)  # noqa: PLW2901
        if run.state is None or run.state.type.value not in CLAIMING or run.flow_id not in flows:
            continue
        found.append(
            Claim(
                run=str(run.id),
                state=run.state.type.value,
                state_id=str(run.state.id),
                run_count=run.run_count,
                pulse=read_pulse(run.labels),
                life=seen,
                worker_beat=workers(run),
            )
        )
    return found


class _Workers:
    """When workers were last heard of; each pool is asked for once."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client
        self._pools: dict[str, dict[str, str]] = {}

    def __call__(self, run: FlowRun) -> str | None:
        """What the server last heard of the worker that took the run; None where none is known."""
        pool = run.labels.get("prefect.work-pool.name")
        worker = run.labels.get("prefect.worker.name")
        if not isinstance(pool, str) or not isinstance(worker, str):
            return None
        if pool not in self._pools:
            workers = self._client.read_workers_for_work_pool(pool)
            self._pools[pool] = {one.name: str(one.last_heartbeat_time) for one in workers}
        return self._pools[pool].get(worker)


def _settle_tasks(run: UUID, why: str) -> None:
    """The tasks that a run was at crashed with it."""
    claiming = [StateType[name] for name in CLAIMING]
    with get_client(sync_client=True) as client:
        left = client.read_task_runs(
            task_run_filter=TaskRunFilter(
                flow_run_id=TaskRunFilterFlowRunId(any_=[run]),
                state=TaskRunFilterState(type=TaskRunFilterStateType(any_=claiming)),
            )
        )
        for task in left:
            client.set_task_run_state(task.id, Crashed(message=why), force=True)


def _say_alive(client: SyncPrefectClient) -> None:
    """Leave a word that somebody looks, for `sdn doctor`."""
    from prefect.client.schemas.actions import VariableCreate, VariableUpdate

    value = {"host": platform.node(), "pid": os.getpid(), "at": round(time.time())}
    with suppress(Exception):
        if client.read_variable_by_name(RECONCILER) is None:
            client.create_variable(VariableCreate(name=RECONCILER, value=value))
        else:
            client.update_variable(VariableUpdate(name=RECONCILER, value=value))

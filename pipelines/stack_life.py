"""The local stack brought up, watched and brought down."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import httpx
import psutil

from pipelines.ending import end
from pipelines.keeping import NAME as SUPERVISOR
from pipelines.marks import mark, mark_of, marked
from pipelines.ports import PortError, check_port, listener, listens
from pipelines.prefect_api import PrefectApi, PrefectApiError
from pipelines.stack import POOL, PREFECT, WORKER, WORKER_S
from pipelines.stack_signals import undisturbed
from pipelines.stack_state import Probe, flow_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from pipelines.marks import Marked
    from pipelines.settings import Settings
    from pipelines.stack import Plan, Stack

    Say = Callable[[str], None]

_PATIENCE_S = 300.0
_LOOK_EVERY_S = 0.25
_SERVER_GRACE_S = 20.0
_CANCEL_S = 30.0
"""What Prefect may take to cancel, beside the time for a checkpoint."""
_SETTLE_S = 3.0
_LIVE = {"RUNNING", "CANCELLING", "PENDING"}
_DEPLOY, _BLOCKS = "deploy", "blocks"
_NO_ANSWER = (httpx.HTTPError, PrefectApiError)


class StackError(RuntimeError):
    """The stack cannot be brought up or down; the text says why and what to do."""


@contextmanager
def only_one(stack: Stack, wait_s: float = 0) -> Iterator[None]:
    """Held while a command changes the stack.

    Raises:
        StackError: another one is at it.
    """
    from filelock import FileLock, Timeout

    stack.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(stack.folder / "lock", timeout=wait_s):
            yield
    except Timeout as error:
        raise StackError(
            f"another `sdn up` or `sdn down` is at work on the stack in {stack.folder}: wait until "
            "it is done, then look with `sdn status`"
        ) from error


def bring_up(stack: Stack, plan: Plan, settings: Settings, say: Say) -> None:
    """Start what does not run, and wait until all of it is healthy and everything is deployed.

    Flow runs that outlived an earlier stack go on. What was started, and nothing else, is ended
    again if it fails.

    Args:
        stack: whose parts.
        plan: which parts, on which ports.
        settings: with SDN_AUTH.
        say: told of each step.

    Raises:
        PortError: a port cannot be had.
        StackError: another plan runs, or a part does not become healthy; with what it said.
    """
    with only_one(stack):
        states = stack.keeper.states()
        if states is not None and stack.plan() != plan:
            raise StackError(
                f"the stack in {stack.folder} runs with other ports or parts: `sdn down` first"
            )
        going: list[str] = []
        if states is None:
            going = _clear(stack, say)
            _check_ports(plan)
            stack.prepare(plan, settings)
        env, new = stack.env(plan, settings, os.environ), stack.new
        try:
            if states is None:
                stack.keeper.start(stack.programs(plan, settings), env)
            else:
                for one in states.values():
                    if one.state in {"FATAL", "EXITED", "STOPPED"}:
                        say(f"{one.name} had ended ({one.why}); started again")
                        stack.keeper.again(one.name)
            _wait(stack, plan, settings, env, say, new=new)
            _resume(stack, settings)
        except BaseException:
            if states is None:
                with undisturbed():
                    say("ending what was started")
                    _end_all(stack, settings, say, spare=going)
            raise
        if new:
            _begin(stack, _BLOCKS, "pipelines.flows.blocks", env=env)


def _clear(stack: Stack, say: Say) -> list[str]:
    """End what a stack has left whose supervisor was killed; its flow runs go on.

    Returns:
        Ids of those.
    """
    left = [one for one in marked(stack.folder) if one.flow_run is None]
    if left:
        say(
            f"the supervisor of an earlier stack is gone; what it has left is ended: "
            f"{', '.join(map(str, left))}"
        )
        # A worker that is told to end would end its flow runs, a supervisor its worker.
        for part in (SUPERVISOR, WORKER):
            end([one.process for one in left if one.part == part], 0)
        end([one.process for one in left], _SERVER_GRACE_S)
    going = flow_runs(marked(stack.folder))
    if going:
        say(f"flow runs of an earlier stack go on: {', '.join(going)}")
    return list(going)


def _check_ports(plan: Plan) -> None:
    """Refuse ports that are taken, and say by whom.

    Raises:
        PortError: as said, a line for each.
    """
    taken = []
    for what, (port, option) in plan.ports.needed(ray=plan.ray).items():
        try:
            check_port(port, what=what, option=option)
        except PortError as error:
            found = listener(port)
            other = None if found is None else _mark_of(found.pid)
            if found is None or other is None:
                taken.append(str(error))
            else:
                taken.append(
                    f"port {port} for {what} is in use by {found}, of the stack in "
                    f"{other.folder}: end it with `SDN_STACK={other.folder} sdn down`, or name "
                    f"another port with {option}"
                )
    if taken:
        raise PortError("\n".join(taken))


def _mark_of(pid: int) -> Marked | None:
    with suppress(psutil.Error):
        return mark_of(psutil.Process(pid))
    return None


def _wait(
    stack: Stack, plan: Plan, settings: Settings, env: dict[str, str], say: Say, *, new: bool
) -> None:
    """Deploy, and wait until every part is healthy.

    Raises:
        StackError: with the end of the log of what failed.
    """
    began = time.monotonic()
    probe, left = Probe(plan, settings), dict.fromkeys(plan.parts, "")
    with _deploying(stack, env, new=new) as deploying:
        done = False
        while left or not done:
            seconds = time.monotonic() - began
            for name, why in _look_at(stack, probe, left).items():
                left[name] = why
                if not why:
                    del left[name]
                    say(f"  {name:<8} healthy after {seconds:.1f} s")
            if not done and deploying.poll() is not None:
                done = True
                if deploying.returncode != 0:
                    raise StackError(f"`sdn deploy` failed: {stack.keeper.tail(_DEPLOY)}")
                say(f"  {_DEPLOY:<8} done after {seconds:.1f} s")
            if seconds > _PATIENCE_S:
                name = next(iter(left), _DEPLOY)
                raise StackError(
                    f"{name} was not healthy within {_PATIENCE_S:.0f} s ({left.get(name, '')}); "
                    f"the end of {stack.keeper.log(name)}:\n{stack.keeper.tail(name)}"
                )
            time.sleep(_LOOK_EVERY_S)


@contextmanager
def _deploying(
    stack: Stack, env: dict[str, str], *, new: bool
) -> Iterator[subprocess.Popen[bytes]]:
    """`sdn deploy`, which itself waits for what it needs; ended if it is not done by then."""
    early = ["--load-early"] if new else []
    process = _begin(stack, _DEPLOY, "pipelines.cli", "deploy", "--pool", POOL, *early, env=env)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _begin(
    stack: Stack, name: str, module: str, *words: str, env: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a module as a process of the stack that ends by itself; what it says is in its log."""
    log = stack.keeper.log(name)
    log.parent.mkdir(mode=0o700, exist_ok=True)
    with log.open("w") as out:
        return subprocess.Popen(  # noqa: S603 (our own module)
            [sys.executable, "-m", module, *words],
            cwd=stack.folder,
            env=env | mark(stack.folder, name),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,  # it may outlive the terminal, as the stack does
        )


def _look_at(stack: Stack, probe: Probe, names: Iterable[str]) -> dict[str, str]:
    """Why each of these parts is not healthy; empty text where it is.

    Raises:
        StackError: one was given up, or the supervisor is gone.
    """
    states = stack.keeper.states()
    if states is None:
        if not [one for one in marked(stack.folder) if one.part == SUPERVISOR]:
            raise StackError(f"supervisor ended:\n{stack.keeper.tail(SUPERVISOR)}")
        return {}  # it is starting
    for one in states.values():
        if one.state == "FATAL":
            raise StackError(
                f"{one.name} does not start; the end of {stack.keeper.log(one.name)}:\n"
                f"{stack.keeper.tail(one.name)}"
            )
    return {name: probe.unhealthy(name, states[name].pid or None) for name in names}


def follow(stack: Stack, say: Say) -> bool:
    """Tell what happens to the parts, until the supervisor ends.

    Returns:
        Whether the stack was ended in good order by another command.
    """
    pids: dict[str, int] = {}
    while (states := stack.keeper.states()) is not None:
        for one in states.values():
            before = pids.get(one.name)
            if one.pid and before is not None and before != one.pid:
                say(f"{one.name} had ended and was started again (pid {one.pid})")
            if one.state == "FATAL" and before is not None:
                say(f"{one.name} does not start any more: see {stack.keeper.log(one.name)}")
                del pids[one.name]
            if one.pid:
                pids[one.name] = one.pid
        time.sleep(1)
    with only_one(stack, wait_s=_PATIENCE_S):  # `sdn down` may be at it
        return not [one for one in marked(stack.folder) if one.flow_run is None]


def bring_down(stack: Stack, settings: Settings, say: Say) -> bool:
    """End every process of the stack; trainings write a last checkpoint first.

    Returns:
        Whether there was anything to end.

    Raises:
        StackError: another command is at work, or something would not end.
    """
    with only_one(stack):
        return _end_all(stack, settings, say)


def _end_all(stack: Stack, settings: Settings, say: Say, spare: Collection[str] = ()) -> bool:
    """End every process but those of flow runs to spare; whether there was any."""
    found = _processes(stack, spare)
    if found:
        going = list(flow_runs(found))
        if going:
            say(
                f"{len(going)} flow runs are going on ({', '.join(going)}); they are ended, a "
                f"training after a last checkpoint (SDN_GRACE_S={settings.grace_s:g})"
            )
        # While the servers are there to be told.
        with _pool_paused(stack, settings) if going else nullcontext():
            _cancel(stack, settings, going, spare)
            stack.keeper.stop(WORKER)
            left = _processes(stack, spare)
            runs = [one for one in left if one.flow_run is not None]
            # One that nobody keeps is not ended by the supervisor.
            workers = [one for one in left if one.part == WORKER and one.flow_run is None]
            _end(workers, settings.grace_s + WORKER_S, say)
            _end(runs, settings.grace_s + 5, say)
        supervisors = [one for one in found if one.part == SUPERVISOR]
        _end(supervisors, 2 * _SERVER_GRACE_S, say)
        _end(_processes(stack, spare), _SERVER_GRACE_S, say)
    stack.clear_runtime()
    left = _processes(stack, spare)
    if left:
        raise StackError(f"these would not end: {', '.join(map(str, left))}")
    plan = stack.plan()
    if found and plan is not None:
        for what, (port, _) in plan.ports.needed(ray=plan.ray).items():
            if listens(port):
                say(f"port {port} of {what} is still listened on, by {listener(port)}")
    return bool(found)


def _processes(stack: Stack, spare: Collection[str]) -> list[Marked]:
    """Those of the stack, without flow runs to spare."""
    return [one for one in marked(stack.folder) if one.flow_run not in spare]


@contextmanager
def _pool_paused(stack: Stack, settings: Settings) -> Iterator[None]:
    """The worker begins no flow run inside: each that is cancelled would make room for the next.

    A pool that was paused before stays so, and runs that wait go on waiting.
    """
    with suppress(*_NO_ANSWER), _prefect(stack, settings) as api:
        if not api.ask("GET", f"work_pools/{POOL}")["is_paused"]:
            stack.paused.touch()  # before: a start resumes it where this is killed
            api.ask("PATCH", f"work_pools/{POOL}", {"is_paused": True})
    try:
        yield
    finally:
        _resume(stack, settings)


def _resume(stack: Stack, settings: Settings) -> None:
    """Let flow runs begin again that an ending stack has kept from it."""
    if stack.paused.exists():
        with suppress(*_NO_ANSWER), _prefect(stack, settings) as api:
            api.ask("PATCH", f"work_pools/{POOL}", {"is_paused": False})
            stack.paused.unlink(missing_ok=True)


def _cancel(
    stack: Stack, settings: Settings, going: list[str], spare: Collection[str] = ()
) -> None:
    """Let Prefect cancel flow runs, as its page does, so that none stays Running for ever.

    Waits for them; where Prefect cannot be asked, their processes are ended all the same.
    """
    message = (
        "ended with its stack; it goes on from its last checkpoint: Retry on the run's page, or "
        "the same run started again"
    )
    state = {"type": "CANCELLING", "message": message}
    until = time.monotonic() + settings.grace_s + _CANCEL_S
    asked: list[str] = []
    with suppress(*_NO_ANSWER), _prefect(stack, settings) as api:
        while going and time.monotonic() < until:
            # Among them runs that the worker was about to begin.
            for run in going:
                if run not in asked:
                    api.ask("POST", f"flow_runs/{run}/set_state", {"state": state}, absent=None)
                    asked.append(run)
            time.sleep(1)
            going = list(flow_runs(_processes(stack, spare)))
        if asked:
            time.sleep(_SETTLE_S)  # in which the worker tells how they ended
        for run in asked:
            found = api.ask("GET", f"flow_runs/{run}", absent={})
            # Its process was gone before it could say so, or said less, or was cut off at saying.
            if found.get("state_type") in {*_LIVE, "CANCELLED", "CRASHED"}:
                ended = {"state": state | {"type": "CANCELLED"}, "force": True}
                api.ask("POST", f"flow_runs/{run}/set_state", ended, absent=None)


def _prefect(stack: Stack, settings: Settings) -> PrefectApi:
    """The stack's.

    Raises:
        PrefectApiError: it was never started.
    """
    plan = stack.plan()
    if plan is None:
        raise PrefectApiError(f"there is no stack in {stack.folder}")
    return PrefectApi(f"{plan.urls[PREFECT]}/api", settings.credentials)


def _end(processes: list[Marked], grace_s: float, say: Say) -> None:
    killed = end([one.process for one in processes], grace_s)
    if killed:
        say(f"killed, for they did not end within {grace_s:.0f} s: {[one.pid for one in killed]}")

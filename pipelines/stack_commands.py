"""`sdn up`, `sdn status`, `sdn down`, `sdn deploy`: a whole stack on this machine."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.stack_signals import ends_by_interrupt
from pipelines.terminal import JsonOption, answer, expected_errors, quiet, say, table

if TYPE_CHECKING:
    from pipelines.settings import Settings
    from pipelines.stack import Plan, Stack
    from pipelines.stack_state import StackState

FolderOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="Folder whose stack it is [default: SDN_STACK, SDN_STORE where local, else runs]",
    ),
]


def _port(name: str, default: int) -> Any:
    return typer.Option(
        name, min=1, max=65535, help=f"[default: as last time, else {default}]", show_default=False
    )


def up(
    store: FolderOption = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once it is healthy; `sdn down` ends it.")
    ] = False,
    ray: Annotated[
        bool | None,
        typer.Option(
            "--ray/--no-ray",
            help="A Ray cluster, too. [default: as last time, else no]",
            show_default=False,
        ),
    ] = None,
    s3_port: Annotated[int | None, _port("--s3-port", 8333)] = None,
    mlflow_port: Annotated[int | None, _port("--mlflow-port", 5000)] = None,
    prefect_port: Annotated[int | None, _port("--prefect-port", 4200)] = None,
    ray_port: Annotated[int | None, _port("--ray-port", 6379)] = None,
    dashboard_port: Annotated[int | None, _port("--dashboard-port", 8265)] = None,
) -> None:
    """Start S3, MLflow, Prefect and a worker on this machine, deploy the flows; until Ctrl-C."""
    with expected_errors():
        quiet()
        from pipelines.settings import Settings
        from pipelines.stack import Plan, Stack
        from pipelines.stack_life import bring_up

        settings = Settings()
        stack = Stack.of(store, settings)
        before = stack.plan() or Plan()
        asked = {
            "s3": s3_port,
            "mlflow": mlflow_port,
            "prefect": prefect_port,
            "ray": ray_port,
            "dashboard": dashboard_port,
        }
        ports = replace(before.ports, **{k: v for k, v in asked.items() if v is not None})
        plan = Plan(ports=ports, ray=before.ray if ray is None else ray)
        ran = stack.keeper.states() is not None
        if ran:
            settings = stack.with_login(settings)
        began = time.monotonic()
        with ends_by_interrupt():
            bring_up(stack, plan, settings, _say)
            news = "runs already, and all of it is healthy"
            if not ran:
                news = f"is up after {time.monotonic() - began:.1f} s"
            if detach or ran:
                _tell(stack, plan, news)
                where = "" if store is None else f" --store {store}"
                _say(f"`sdn status{where}` looks, `sdn down{where}` ends it")
            else:
                _follow(stack, plan, settings, news)


def status(store: FolderOption = None, *, as_json: JsonOption = False) -> None:
    """Each part of the stack: state, process, port, memory, page; exit 1 if not all are healthy."""
    with expected_errors():
        from pipelines.settings import Settings
        from pipelines.stack import Stack
        from pipelines.stack_state import look

        settings = Settings()
        stack = Stack.of(store, settings)
        settings = stack.with_login(settings)
        plan = stack.plan()
        if plan is None:
            say(f"there is no stack in {stack.folder}; `sdn up` makes one", error=True)
            answer({"folder": str(stack.folder), "healthy": False, "parts": []}, as_json=as_json)
            raise typer.Exit(1)
        found = look(stack, plan, settings)
        if not as_json:
            _show(stack, found)
        answer({"folder": str(stack.folder), **found.as_dict()}, as_json=as_json)
        if not found.healthy:
            raise typer.Exit(1)


def down(store: FolderOption = None) -> None:
    """End the stack and all that it has started; its data stay."""
    with expected_errors():
        quiet()
        from pipelines.settings import Settings
        from pipelines.stack import Stack
        from pipelines.stack_life import bring_down

        settings = Settings()
        stack = Stack.of(store, settings)
        if not stack.folder.is_dir():
            say(f"there is no stack in {stack.folder}")
            return
        began = time.monotonic()
        if bring_down(stack, stack.with_login(settings), say):
            say(f"the stack in {stack.folder} has ended ({time.monotonic() - began:.1f} s)")
        else:
            say(f"no process of the stack in {stack.folder} runs")


def deploy(
    pool: Annotated[str, typer.Option("--pool", help="Work pool of the deployments.")] = "sdn",
    kind: Annotated[
        str, typer.Option("--type", help="Of the pool, if it has to be made: process, kubernetes.")
    ] = "process",
    trainings: Annotated[
        int | None,
        typer.Option("--trainings", min=1, help="Flow runs of the queue `training` at a time."),
    ] = None,
    runs: Annotated[
        int | None, typer.Option("--runs", min=1, help="Flow runs of the pool at a time.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="With the deployments [default: prefect.yaml of the project]"),
    ] = None,
    early: Annotated[
        bool,
        typer.Option("--load-early", help="Load the flows while the server starts.", hidden=True),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the bucket, the work pool, its queues and the deployments, where they are not there."""
    with expected_errors():
        quiet()
        from pipelines.deploying import Wanted, deploy
        from pipelines.settings import Settings

        wanted = Wanted(
            pool=pool, kind=kind, trainings=trainings, runs=runs, file=file, early=early
        )
        found = deploy(Settings(), wanted, lambda text: say(text, error=as_json))
        if not (found["made"] or found["deployed"]):
            say("nothing to do: all of it is there", error=as_json)
        answer(found, as_json=as_json)


def _tell(stack: Stack, plan: Plan, news: str) -> None:
    """What has come of it, where everything is, and what to do next."""
    _say(f"the stack in {stack.folder} {news}")
    titles = {
        "s3": "S3",
        "mlflow": "MLflow: runs and models",
        "prefect": "Prefect: start and watch flows",
        "ray": "Ray's dashboard",
    }
    for name, url in plan.urls.items():
        _say(f"  {url}  {titles[name]}")
    if plan.ray:
        _say(
            "Ray cannot be bound to this machine alone in all its ports; it asks for a token "
            f"({stack.folder / 'ray-token'}), also its dashboard"
        )
    _say(f". {stack.env_file}    lets `sdn run`, `mlflow` and `prefect` of your shell use it")


def _show(stack: Stack, found: StackState) -> None:
    rows = [
        (
            part.name,
            part.state,
            "" if part.pid is None else str(part.pid),
            "" if part.port is None else str(part.port),
            f"{part.memory_mib:.0f} MiB",
            part.url or "",
        )
        for part in found.parts
    ]
    table(("part", "state", "pid", "port", "memory", "page"), rows)
    for part in found.parts:
        if part.why:
            say(f"{part.name}: {part.why}")
    if found.flow_runs:
        say(f"flow runs going on: {', '.join(found.flow_runs)}")
    if not found.kept:
        left = "what runs is not kept running: `sdn up` puts it right, `sdn down` ends it"
        say(left if found.processes else f"the stack in {stack.folder} does not run: `sdn up`")
    say(f"memory of all of it, without flow runs: {found.memory_mib:.0f} MiB")


def _say(text: str) -> None:
    """A line for the reader; one who has gone, as with a closed terminal, is told nothing more."""
    try:
        say(text)
    except OSError:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _follow(stack: Stack, plan: Plan, settings: Settings, news: str) -> None:
    """Watch until Ctrl-C, which ends the stack, or until another command ends it."""
    from pipelines.stack_life import bring_down, follow

    try:
        _tell(stack, plan, news)
        _say("Ctrl-C ends all of it")
        ended = follow(stack, _say)
    except KeyboardInterrupt:
        _say("\nending the stack")
        bring_down(stack, settings, _say)
        _say("the stack has ended; its data stay, `sdn up` starts it again")
        return
    if ended:
        _say("the stack was ended by another command")
        return
    _say("the supervisor is gone, what it kept still runs: `sdn up` puts it right")
    raise typer.Exit(1)

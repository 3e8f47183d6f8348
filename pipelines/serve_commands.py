"""`sdn serve PART`: checks, and then becomes the part's program.

Compose and Kubernetes run the very commands that `sdn up` runs.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.ports import HOST
from pipelines.terminal import expected_errors, say

if TYPE_CHECKING:
    from pipelines.serving import Program
    from pipelines.settings import Settings

_GRACE_S = 5.0
_POOL_PATIENCE_S = 300.0

HostOption = Annotated[
    str, typer.Option("--host", help="Where to listen; beyond this machine a login is needed.")
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database", metavar="URI", help="[default: SDN_DATABASE; with a password there]"
    ),
]

serve = typer.Typer(name="serve", help="Run one part of a stack.", no_args_is_help=True)


def _port(default: int) -> object:
    return typer.Option(
        "--port", min=1, max=65535, help=f"[default: {default}]", show_default=False
    )


@serve.command()
def s3(
    folder: Annotated[Path, typer.Option("--folder", help="Of its data.")],
    host: HostOption = HOST,
    port: Annotated[int, _port(8333)] = 8333,
) -> None:
    """An S3 server (SeaweedFS) whose one user has the AWS_* keys of the environment."""
    with expected_errors():
        from pipelines.ports import free_ports
        from pipelines.serving import WEED_PORTS, s3_program

        _become(
            s3_program(
                _settings(),
                host=host,
                port=port,
                folder=folder.resolve(),
                inside=free_ports(WEED_PORTS),
            )
        )


@serve.command()
def mlflow(
    artifacts: Annotated[
        str, typer.Option("--artifacts", metavar="PLACE", help="s3://bucket/prefix or a folder.")
    ],
    host: HostOption = HOST,
    port: Annotated[int, _port(5000)] = 5000,
    database: DatabaseOption = None,
) -> None:
    """MLflow's server, through which artifacts pass, too; with SDN_AUTH it asks for a login."""
    with expected_errors():
        from pipelines import serving

        settings = _settings()
        uri = serving.database(database, settings)
        _become(
            serving.mlflow_program(settings, host=host, port=port, uri=uri, artifacts=artifacts)
        )


@serve.command()
def prefect(
    host: HostOption = HOST,
    port: Annotated[int, _port(4200)] = 4200,
    database: DatabaseOption = None,
) -> None:
    """Prefect's server; with SDN_AUTH it asks for a login."""
    with expected_errors():
        from pipelines import serving

        settings = _settings()
        uri = serving.database(database, settings)
        _become(serving.prefect_program(settings, host=host, port=port, uri=uri))


@serve.command()
def worker(
    pool: Annotated[str, typer.Option("--pool", help="Whose flow runs it starts.")] = "sdn",
    kind: Annotated[str, typer.Option("--type", help="Of the pool.")] = "process",
) -> None:
    """A worker, which starts flow runs; waits for the server and the pool (`sdn deploy`)."""
    with expected_errors():
        from pipelines.serving import worker_program

        settings = _settings()
        program = worker_program(settings, pool=pool, kind=kind)
        _wait_for_pool(settings, pool)
        _become(program)


@serve.command()
def ray(
    port: Annotated[int, _port(6379)] = 6379,
    dashboard_port: Annotated[
        int, typer.Option("--dashboard-port", min=1, max=65535, help="Of the head.")
    ] = 8265,
    join: Annotated[
        str | None,
        typer.Option("--join", metavar="HOST:PORT", help="The head to join, instead of being one."),
    ] = None,
    cpus: Annotated[
        int | None, typer.Option("--cpus", min=0, help="To offer; all by default.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", help=f"Where the head's dashboard listens. [default: {HOST}]"),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Of its sessions; a short path.")
    ] = None,
) -> None:
    """A node of a Ray cluster, which asks for the cluster's token (RAY_AUTH_TOKEN, or a file)."""
    with expected_errors():
        from pipelines.ports import free_ports
        from pipelines.serving import ray_program

        _become(
            ray_program(
                host=host,
                port=port,
                dashboard_port=dashboard_port,
                join=join,
                cpus=cpus,
                folder=folder,
                inside=free_ports(3),
            )
        )


def _settings() -> Settings:
    from pipelines.settings import Settings

    return Settings()


def _wait_for_pool(settings: Settings, pool: str) -> None:
    """Wait until the server answers and has the pool: a worker alone would make one without limits.

    Raises:
        RuntimeError: it did not come in time.
    """
    from pipelines.prefect_api import PrefectApi

    until, told = time.monotonic() + _POOL_PATIENCE_S, False
    with PrefectApi.of(settings) as api:
        while not api.has_pool(pool):
            if time.monotonic() > until:
                raise RuntimeError(
                    f"{api.url} has had no work pool {pool!r} for {_POOL_PATIENCE_S:.0f} s: run "
                    f"`sdn deploy --pool {pool}`"
                )
            if not told:
                say(f"waiting for the work pool {pool} at {api.url}; `sdn deploy` makes it")
                told = True
            time.sleep(0.5)


def _become(program: Program) -> None:
    """End what an earlier process of the same part has left, write its files, become it."""
    from pipelines.fresh_databases import file_of, lay
    from pipelines.private_files import write_private
    from pipelines.stack_sockets import clear_sockets

    _end_predecessors()
    if program.folder is not None:
        clear_sockets(program.folder)
    if program.fresh is not None:
        shutil.rmtree(program.fresh, ignore_errors=True)
    for folder in filter(None, (program.folder, *(path.parent for path in program.files))):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path, text in program.files.items():
        write_private(path, text)
    if program.folder is not None:
        os.chdir(program.folder)
    env = program.environment(os.environ)
    if program.database is not None and (file := file_of(program.database, env)) is not None:
        lay(program.database, file)
    os.execvpe(program.argv[0], list(program.argv), env)  # noqa: S606 (without a shell)


def _end_predecessors() -> None:
    """End what a killed process of this part of the stack has left: it still has the port.

    Flow runs go on: they are not their worker's only.
    """
    import psutil

    from pipelines.ending import end
    from pipelines.marks import mark_of, marked

    mine = mark_of(psutil.Process())
    if mine is None:  # no stack's, but somebody's own
        return
    left = [
        one for one in marked(Path(mine.folder)) if one.part == mine.part and one.flow_run is None
    ]
    if left:
        say(f"ending what was left of an earlier {mine.part}: pid {[o.process.pid for o in left]}")
        end([one.process for one in left], _GRACE_S)

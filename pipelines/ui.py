"""`sdn ui`: the pages of MLflow and Prefect for what embedded runs have left, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.keeping import Keeper, Kept
from pipelines.ports import HOST, check_port
from pipelines.tracking_place import tracking_uri

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.settings import Settings

_PATIENCE_S = 300
_STOP_S = 15


class PageError(RuntimeError):
    """A server does not start; the text is what it said."""


def serve(
    settings: Settings, mlflow_port: int, prefect_port: int, say: Callable[[str], None]
) -> None:
    """Keep both servers running until Ctrl-C.

    Args:
        settings: where the runs are.
        mlflow_port: for MLflow's pages.
        prefect_port: for Prefect's pages.
        say: told each address when it answers.

    Raises:
        PortError: one of the ports cannot be had.
        ValueError: there are servers already, or nothing to show.
        PageError: one of them does not start.
    """
    uri = tracking_uri(settings)
    if uri.startswith("http"):
        raise ValueError(f"MLflow runs at {uri} already (SDN_TRACKING_URI): open that address")
    if settings.prefect_api_url is not None:
        raise ValueError(
            f"Prefect runs at {settings.prefect_api_url} already (PREFECT_API_URL): open that "
            "address, without /api"
        )
    check_port(mlflow_port, what="MLflow", option="--mlflow-port")
    check_port(prefect_port, what="Prefect", option="--prefect-port")
    settings.local.mkdir(parents=True, exist_ok=True)
    commands = {
        "mlflow": ["mlflow", "server", "--workers", "1"],
        "prefect": ["prefect", "server", "start"],
    }
    ports = {"mlflow": mlflow_port, "prefect": prefect_port}
    programs = [
        Kept(
            name=name,
            argv=[sys.executable, "-m", *command, "--host", HOST, "--port", str(ports[name])],
            env={},
            start_s=20,
            stop_s=_STOP_S,
            folder=Path.cwd(),  # to which a database's address may be relative
        )
        for name, command in commands.items()
    ]
    with tempfile.TemporaryDirectory(prefix="sdn-ui-") as folder:
        keeper = Keeper(Path(folder), Path(folder) / "s.sock")
        # By the environment: a database's address may hold a password.
        env = {
            "MLFLOW_BACKEND_STORE_URI": uri,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            # Else Prefect's page asks its usual port, whatever --prefect-port says.
            "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{prefect_port}/api",
        }
        supervisor = keeper.start(programs, os.environ | env)
        try:
            _tell(ports, keeper, supervisor, say)
            supervisor.wait()
        except KeyboardInterrupt:
            pass
        finally:
            supervisor.terminate()
            supervisor.wait()


def _tell(
    ports: dict[str, int],
    keeper: Keeper,
    supervisor: subprocess.Popen[bytes],
    say: Callable[[str], None],
) -> None:
    """Each address once its server answers.

    Raises:
        PageError: it does not start.
    """
    import httpx

    until = time.monotonic() + _PATIENCE_S
    for name, port in ports.items():
        url = f"http://{HOST}:{port}"
        while True:
            states = keeper.states() or {}
            failed = name in states and states[name].state == "FATAL"
            if failed or supervisor.poll() is not None or time.monotonic() > until:
                raise PageError(f"{name} does not start; it said:\n{keeper.tail(name)}")
            try:
                httpx.get(f"{url}/health" if name == "mlflow" else f"{url}/api/health", timeout=3)
            except httpx.HTTPError:
                time.sleep(0.3)
            else:
                say(f"{name}: {url}")
                break
    say("Ctrl-C ends both")

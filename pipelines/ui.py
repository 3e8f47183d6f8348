"""`sdn ui`: the pages of MLflow and Prefect for what embedded runs have left, on this machine."""

from __future__ import annotations

import errno
import shlex
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

from pipelines.tracking import tracking_uri

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.settings import Settings

HOST = "127.0.0.1"
_PATIENCE_S = 120


class PortError(RuntimeError):
    """A port cannot be had; the text says which and what to do."""


def check_port(port: int, *, what: str, option: str) -> None:
    """Refuse a port that cannot be listened on, before anything is started.

    Args:
        port: on this machine.
        what: who wants it.
        option: names another one.

    Raises:
        PortError: it is in use, or not ours to take.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            why = "in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise PortError(
                f"port {port} for {what} is {why}: end what listens there, or name another with "
                f"{option} {port + 1}"
            ) from error


def serve(
    settings: Settings, mlflow_port: int, prefect_port: int, say: Callable[[str], None]
) -> int:
    """Run both servers until Ctrl-C, or until one of them ends.

    Args:
        settings: where the runs are.
        mlflow_port: for MLflow's pages.
        prefect_port: for Prefect's pages.
        say: told each address when it answers.

    Returns:
        The exit status of the first that ended; 0 after Ctrl-C.

    Raises:
        PortError: one of the ports cannot be had.
        ValueError: there are servers already, or nothing to show.
    """
    from honcho.manager import Manager
    from honcho.printer import Printer

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
    manager = Manager(Printer(sys.stderr))
    commands = {
        "mlflow": ["mlflow", "server", "--backend-store-uri", uri, "--workers", "1"],
        "prefect": ["prefect", "server", "start"],
    }
    ports = {"mlflow": mlflow_port, "prefect": prefect_port}
    for name, command in commands.items():
        place = ["--host", HOST, "--port", str(ports[name])]
        manager.add_process(name, shlex.join([sys.executable, "-m", *command, *place]), quiet=True)
    told = threading.Thread(target=_tell, args=(ports, say), daemon=True)
    told.start()
    manager.loop()
    return 0 if manager.returncode in (130, 143) else int(manager.returncode or 0)


def _tell(ports: dict[str, int], say: Callable[[str], None]) -> None:
    """Each address once its server answers."""
    import httpx

    until = time.monotonic() + _PATIENCE_S
    for name, port in ports.items():
        url = f"http://{HOST}:{port}"
        while time.monotonic() < until:
            try:
                httpx.get(f"{url}/health" if name == "mlflow" else f"{url}/api/health", timeout=3)
            except httpx.HTTPError:
                time.sleep(0.3)
            else:
                say(f"{name}: {url}")
                break
    say("Ctrl-C ends both")

"""The whole tiny chain, run once as a user runs it, for all tests that look at what it left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from places import WORK, Place, Server, background, deploy, free_port, place, prefect_server

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, dict[str, Any]]:
    """A place in which `sdn run tiny` has run once, and what it answered."""
    here = place(tmp_path_factory.mktemp("chain"))
    return here, here.run()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Prefect server with all that `prefect.yaml` deploys, and a worker."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    ui = f"http://127.0.0.1:{port}"
    api = f"{ui}/api"
    env = place(folder).env | {"PWD": str(folder)}
    # Else its page looks for the API at the port of the settings, whatever --port says.
    of_page = {"UI_API_URL": api, "UI_SHOW_PROMOTIONAL_CONTENT": "false"}
    served = env | {f"PREFECT_SERVER_{name}": value for name, value in of_page.items()}
    log = folder / "worker.log"
    with prefect_server(folder, port, served):
        deployments = deploy(api, env | {"PREFECT_API_URL": api})
        with background(*WORK, env=env | {"PREFECT_API_URL": api}, log=log) as worker:
            yield Server(api, ui, deployments, worker.pid, log, folder)

"""Ray: embedded, or a cluster with a dashboard, our versions and enough cores."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipelines.diagnosis.check import Check
from pipelines.jobs import ClusterError, connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.settings import Settings
    from sdn.config import RunConfig


def look_at_ray(settings: Settings, config: RunConfig) -> Iterator[Check]:
    """The cluster at the configured address."""
    if settings.ray_address is None:
        yield Check(ok=True, what="Ray", found="embedded, in this process")
        return
    try:
        client = connect(settings.ray_address)
        about = _about(client)
    except (ClusterError, RuntimeError, OSError) as error:
        remedy = (
            "start it with `sdn serve ray` (`sdn up --ray` for all of it), bring its token "
            "(RAY_AUTH_TOKEN or ~/.ray/auth_token), or unset SDN_RAY_ADDRESS to run embedded"
        )
        found = str(error).splitlines()[0][:300]
        yield Check(ok=False, what="Ray", found=found, remedy=remedy)
        return
    yield Check(ok=True, what="Ray", found=f"{client.get_address()} answers")
    yield guard(client.get_address())
    yield from versions(about)
    yield room(_cpus(client), config)


def guard(url: str) -> Check:
    """What keeps others out of ports that cannot all be bound to one machine.

    Args:
        url: of the dashboard, which is asked for its jobs without a token.
    """
    import httpx

    answer = httpx.get(f"{url.rstrip('/')}/api/jobs/", timeout=5)
    asks = answer.status_code in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}
    said = "it asks for its token" if asks else "whoever reaches them may run any code: no token"
    return Check(
        ok=asks,
        what="Ray's ports",
        found=f"open to the network; {said}",
        remedy="start every node with `sdn serve ray` (RAY_AUTH_MODE=token) and one token, 32 or "
        "more characters: `openssl rand -hex 32 > ~/.ray/auth_token`, the same file on all "
        "machines and here",
    )


def _about(client: Any) -> dict[str, Any]:
    """What the dashboard knows of the cluster."""
    answer = client._do_request("GET", "/api/v0/cluster_metadata")  # noqa: SLF001 (its session)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()["data"]
    return found


def versions(about: dict[str, Any]) -> Iterator[Check]:
    """Ray's and Python's versions, which have to be the same everywhere.

    Args:
        about: `rayVersion` and `pythonVersion` of the cluster.
    """
    there, here = about["rayVersion"], version("ray")
    yield Check(
        ok=there == here,
        what="Ray version",
        found=f"cluster {there}, here {here}",
        remedy=f"install ray=={there} here, or {here} on all nodes",
    )
    there, here = about["pythonVersion"], platform.python_version()
    yield Check(
        ok=there.split(".")[:2] == here.split(".")[:2],
        what="Ray's Python",
        found=f"cluster {there}, here {here}",
        remedy=f"use Python {there} here, or {here} on all nodes: what one pickles the other reads",
    )


def _cpus(client: Any) -> float:
    """Cores of all nodes that live."""
    from ray.util.state import list_nodes

    nodes = list_nodes(address=client.get_address(), filters=[("state", "=", "ALIVE")])
    return sum(float(node.resources_total.get("CPU", 0)) for node in nodes)


def room(cpus: float, config: RunConfig) -> Check:
    """Whether the ranks of a stage find a core each.

    Args:
        cpus: of the cluster.
        config: whose stages are to be trained.
    """
    wanted = config.workers * config.threads
    return Check(
        ok=cpus >= wanted,
        what="Ray cores",
        found=f"{cpus:.0f} in the cluster, a stage of {config.name} takes {wanted}",
        remedy="add nodes, or lower workers and threads (`sdn run --set workers=1`): a stage that "
        "finds too few waits for ever",
    )

"""Ray, on a cluster or in this process: started, asked and stopped. Loads no torch by itself."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.ports import HOST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.settings import Settings


_ALONE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # for nodes that are taken away; there is one
    # Nobody collects these where Ray has no dashboard; they cost a quarter of what Ray computes.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_task_events_report_interval_ms": "0",
}
"""For a Ray that is started in this process."""


def cores(settings: Settings) -> int:
    """Cores that this process may use."""
    if settings.cpus is not None:
        return settings.cpus
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_ray(settings: Settings) -> None:
    """Connect to the cluster at the configured address, or start Ray in this process; once."""
    import ray

    # Workers as important as Ray's own processes, which would take what they want from a nice 15.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if settings.s3_endpoint is not None:  # where Ray keeps checkpoints on S3
        os.environ.setdefault("AWS_ENDPOINT_URL", settings.s3_endpoint)
    here = settings.ray_address is None
    if here:
        for name, value in _ALONE.items():
            os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    if not here:
        bring_token()
    with _of_this_process() if here else nullcontext(), _own_sigterm():
        ray.init(
            # "local": never the cluster that somebody else has started on this machine.
            address=settings.ray_address or "local",
            namespace="sdn",
            num_cpus=cores(settings) if here else None,
            include_dashboard=False if here else None,
            object_store_memory=200 * 1024**2 if here else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )


def bring_token() -> None:
    """Let this process show a cluster its token, where it has one.

    What Ray's own commands do before they ask; `ray.init` and a client for jobs would leave it out.
    """
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """SIGTERM goes on meaning what it meant before, and leaves time for a last checkpoint.

    Ray puts a handler of Python's in the place of Prefect's, by which a run learns that it is
    cancelled; and its C++ part one that aborts the process three seconds after the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # Where nobody had one, Ray's: it ends the process in order. Set again in any case: that
        # takes the signal back from the C++ part.
        now = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before if callable(before) else now)


@contextmanager
def _of_this_process() -> Iterator[None]:
    """Ray's processes that start inside are few, near, and apart from this one's process group.

    Prefect cancels a flow run by SIGTERM to its whole group. Ray must outlive that for as long as
    the ranks need for a last checkpoint; this process ends it then. Neither an autoscaler nor a
    reader of logs has anything to do here: each takes two seconds of a core to start, and a share
    of one afterwards. They listen on 127.0.0.1, and Ray asks everyone for its token by itself.
    """
    from ray._private import parameter, services

    plain: Any = services.ConsolePopen
    params: Any = parameter.RayParams
    services.ConsolePopen = partial(plain, start_new_session=True)  # type: ignore[misc,assignment]
    parameter.RayParams = partial(_few_and_near, params)  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        services.ConsolePopen = plain  # type: ignore[misc]
        parameter.RayParams = params  # type: ignore[misc]


def _few_and_near(params: Any, **given: Any) -> Any:
    """Ray's parameters of a node: those given, without autoscaler and log reader, on loopback."""
    # `ray.init(_node_ip_address=...)` would make the network's address of 127.0.0.1.
    own = {"include_log_monitor": False, "no_monitor": True, "node_ip_address": HOST}
    return params(**given | own)


def started_here() -> bool:
    """Whether Ray was started in this process, rather than found at an address."""
    import ray

    node = ray._private.worker.global_worker.node  # noqa: SLF001 (connected drivers have one too)
    return node is not None and bool(node.head)


def free_reserved() -> None:
    """Give back what dead actors had reserved in the Ray that was started here."""
    import ray
    from ray._raylet import PlacementGroupID
    from ray.exceptions import RayError
    from ray.util.placement_group import (
        PlacementGroup,
        placement_group_table,
        remove_placement_group,
    )

    try:
        for found, about in placement_group_table().items():
            if about["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(found)))
    except (RayError, ray.exceptions.GetTimeoutError):
        return  # Ray is going down itself


def reports() -> Any:
    """The queue through which workers report to this process; one for all stages."""
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    context = ray.get_runtime_context().get_job_id()
    if context not in _QUEUES:
        _QUEUES.clear()
        # Here: on another node it would be lost with that, and ranks unheard be taken for hung.
        node = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        _QUEUES[context] = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    return _QUEUES[context]


_QUEUES: dict[str, Any] = {}


def stop_ray() -> None:
    """Leave the cluster, or end the Ray that was started here; nothing where none was started."""
    if "ray" in sys.modules:
        import ray

        _QUEUES.clear()
        ray.shutdown()


def has_gpu() -> bool:
    """Whether this machine or the cluster has one, or is said to get one (SDN_GPU)."""
    import ray
    import torch

    from pipelines.settings import Settings

    told = Settings().gpu
    if told is not None:
        return told
    return torch.cuda.is_available() or bool(ray.cluster_resources().get("GPU", 0) > 0)  # type: ignore[no-untyped-call]

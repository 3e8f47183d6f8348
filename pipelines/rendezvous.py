"""Where the ranks of a training on this machine alone meet: at its loopback."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_HERE = "127.0.0.1"
_held: list[TCPStore] = []


class Loopback(TorchConfig):
    """A process group none of whose sockets is reached from another machine.

    Ray's own has rank 0 listen at all addresses, and gloo at the one of the host's name.
    """

    @property
    def backend_cls(self) -> Any:
        """What sets the group up."""
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        worker_group.execute(_set_torch_distributed_env_vars)
        port = worker_group.execute_single(0, _listen)
        size = len(worker_group)
        met = [
            worker_group.execute_single_async(
                rank, _meet, port, rank, size, "nccl" if gpu else "gloo", backend_config.timeout_s
            )
            for rank in range(size)
        ]
        ray.get(met)


def _listen() -> int:
    """Open the store of a group in this process; its port."""
    listening = socket.socket()
    listening.bind((_HERE, 0))
    listening.listen(1024)
    port = int(listening.getsockname()[1])
    # The store ends with its object.
    _held[:] = [
        TCPStore(
            _HERE,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
    ]
    return port


def _meet(port: int, rank: int, size: int, backend: str, timeout_s: int) -> None:
    loopback = next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(one.address == _HERE for one in addresses)
    )
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    distributed.init_process_group(
        backend,
        store=TCPStore(_HERE, port, is_master=False),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )

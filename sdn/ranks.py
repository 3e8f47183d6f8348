"""The ranks of a training: what they share, and how a network becomes that of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")


class Agree(Protocol):
    """Every rank gets rank 0's value."""

    def __call__(self, value: T, /) -> T:
        """Called by all ranks at the same point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """Where a training runs, and its words with the other ranks; the default is one rank alone.

    All ranks call each of the functions at the same points.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (a value, not a shared state)
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    """Makes a network distributed: its gradient becomes the mean over the ranks."""
    agree: Agree = lambda value: value
    mean: Callable[[Tensor], Tensor] = lambda value: value
    """Mean over the ranks of a tensor of the same shape on each."""
    together: Callable[[Tensor], Tensor] = lambda value: value.unsqueeze(0)
    """(world, ...): a tensor of the same shape of each rank, on the CPU; no gradient."""
    any: Callable[[bool], bool] = lambda flag: flag
    """Whether the flag is set on any rank. As all wait for all, it is a barrier too."""


ALONE = Rank()
"""One rank on the CPU."""


def of_process_group(device: torch.device, *, compress: str = "none") -> Rank:
    """This process's rank in torch's default process group; one rank alone where there is none.

    Args:
        device: of this rank's networks.
        compress: "bf16" rounds gradients to bfloat16 on their way between ranks.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return Rank(device=device)
    world = distributed.get_world_size()
    # A group for words in the main memory: NCCL knows tensors of GPUs only, and what is said here
    # must not mix with gradients under way.
    words = distributed.new_group(backend="gloo")

    def wrap(module: nn.Module) -> nn.Module:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
        from torch.nn.parallel import DistributedDataParallel

        wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
        if compress == "bf16":
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def agree(value: Any) -> Any:
        values = [value]
        distributed.broadcast_object_list(values, src=0, group=words)
        return values[0]

    def mean(value: Tensor) -> Tensor:
        here = value.detach().to("cpu", copy=True)
        distributed.all_reduce(here, group=words)
        return here / world

    def together(value: Tensor) -> Tensor:
        here = value.detach().cpu().contiguous()
        found = [torch.empty_like(here) for _ in range(world)]
        distributed.all_gather(found, here, group=words)
        return torch.stack(found)

    def any_of(flag: bool) -> bool:
        found = torch.tensor([int(flag)])
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=words)
        return bool(found.item())

    return Rank(
        rank=distributed.get_rank(),
        world=world,
        device=device,
        wrap=wrap,
        agree=agree,
        mean=mean,
        together=together,
        any=any_of,
    )

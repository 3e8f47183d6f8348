"""Rows of all ranks together, for losses in which each row of a global batch meets the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from sdn.ranks import Rank


def gathered(rows: Tensor, count: int, rank: Rank) -> Tensor:
    """The rows of all ranks in the order of the global batch; gradients flow back to each rank.

    Args:
        rows: (B, F), this rank's: rows r, r + world, .. of the global batch.
        count: rows of the global batch.
        rank: this one.

    Returns:
        (count, F), equal on all ranks.
    """
    if rank.world == 1:
        return rows
    everywhere = rows.new_zeros(count, rows.shape[1])
    everywhere[rank.rank :: rank.world] = rows
    return over_ranks(everywhere)


def of_all_ranks(rows: Tensor, count: int, most: int, rank: Rank) -> Tensor:
    """The first `count` rows of each rank, one rank's after another's; gradients flow back.

    For what does not depend on the order of rows: with other ranks it is another one.

    Args:
        rows: (B, F), this rank's.
        count: how many of them are of the global batch; those of a padded batch are not.
        most: the largest `count` there can be; the same on all ranks.
        rank: this one.

    Returns:
        (N, F), equal on all ranks.
    """
    if rank.world == 1:
        return rows[:count]
    places = rows.new_zeros(rank.world, most, rows.shape[1])
    places[rank.rank, :count] = rows[:count]
    taken = torch.zeros(rank.world, most, device=rows.device)
    taken[rank.rank, :count] = 1
    return over_ranks(places)[over_ranks(taken) > 0]


def over_ranks(value: Tensor) -> Tensor:
    """Sum over the ranks of a tensor of the same shape on each; gradients flow back to each."""
    found: Tensor = _OverRanks.apply(value)  # type: ignore[no-untyped-call]
    return found


class _OverRanks(torch.autograd.Function):
    """Each rank's value is in the sum of every rank, so the gradients of all are summed, too."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total

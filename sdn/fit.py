"""What fitting the teacher and fitting the captions share: AdamW in one cycle, over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from sdn.checkpoint import Checkpoint
from sdn.config import to_dict
from sdn.training import copied, gradient_norm_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sdn.config import CaptionConfig, TeacherConfig
    from sdn.ranks import Rank


@dataclass(frozen=True, kw_only=True, slots=True)
class FitBatch:
    """This rank's rows of a step."""

    step: int
    epoch: int
    keys: tuple[str, ...]
    rows: Tensor
    """(B,) int64: rows in the order of the training split."""
    count: int
    """Rows of the global batch."""
    draws: tuple[int, ...] = ()
    """A random number for each of this rank's rows, where the fit wants some."""


class Fit:
    """One network being fitted on one rank; a `sdn.training.Trainee`."""

    beside: frozenset[str] = frozenset()

    def __init__(
        self,
        name: str,
        network: nn.Module,
        config: TeacherConfig | CaptionConfig,
        loss: Callable[[nn.Module, FitBatch], Tensor],
        *,
        steps: int,
        warmup: float,
        decay: float,
        rank: Rank,
        precision: str = "float32",
        clip: float | None = None,
    ) -> None:
        """Args:
        name: of the stage.
        network: what is fitted; on the rank's device.
        config: of the stage.
        loss: (network, batch) -> scalar whose mean over the ranks is that of the global batch.
        steps: in all.
        warmup: share of them in which the rate rises.
        decay: of the weights.
        rank: this one.
        precision: "float32" or "bf16".
        clip: largest norm of the gradient.
        """
        self.name, self.config, self.steps, self.precision = name, config, steps, precision
        self.network, self.device = network, rank.device
        self.forward = rank.wrap(network)
        self._loss, self._clip = loss, clip
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._parameters, lr=config.rate, weight_decay=decay, fused=True
        )
        self.schedule = one_cycle(self.optimizer, config.rate, steps=steps, warmup=warmup)
        self.step = self.images_seen = 0
        self.rate = config.rate
        self.recent_loss: float | None = None

    def advance(self, batch: FitBatch) -> tuple[dict[str, Tensor], Tensor]:
        """One step of the optimizer; see `sdn.training.train`."""
        self.rate = self.optimizer.param_groups[0]["lr"]
        lower = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=lower):
            loss = self._loss(self.forward, batch)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = gradient_norm_of(self.network)
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.images_seen += batch.count
        return {"fit": loss.detach()}, norm

    def checkpoint(self) -> Checkpoint:
        """All state, on the CPU, independent of what comes next."""
        return Checkpoint(
            step=self.step,
            steps=self.steps,
            images_seen=self.images_seen,
            model=copied(self.network.state_dict()),
            average=None,
            optimizer=copied(self.optimizer.state_dict()),
            schedule={k: v for k, v in self.schedule.state_dict().items() if not callable(v)},
            config=to_dict(self.config),
            precision=self.precision,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was taken."""
        self.network.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        assert checkpoint.schedule is not None
        self.schedule.load_state_dict(checkpoint.schedule)
        self.step, self.images_seen = checkpoint.step, checkpoint.images_seen


def fit_batches(
    keys: Sequence[str],
    orders: Iterator[tuple[Tensor, Callable[[], list[int]]]],
    *,
    batch: int,
    epochs: int,
    start: int,
    rank: Rank,
) -> Iterator[FitBatch]:
    """This rank's batches from step `start` on; what does not fill a batch is left out.

    The order is that of one rank, which the ranks share out: rank r takes every world-th row.

    Args:
        keys: of the training split.
        orders: for each epoch its order (N,), and what draws the random numbers of a batch.
        batch: rows a step over all ranks.
        epochs: in all.
        start: first step wanted; the draws of the steps before are made all the same.
        rank: this one.
    """
    per_epoch, step = len(keys) // batch, 0
    for epoch in range(epochs):
        order, draw = next(orders)
        for first in range(0, per_epoch * batch, batch):
            draws = draw()
            if step >= start:
                rows = order[first : first + batch][rank.rank :: rank.world]
                yield FitBatch(
                    step=step,
                    epoch=epoch,
                    keys=tuple(keys[row] for row in rows.tolist()),
                    rows=rows,
                    count=batch,
                    draws=tuple(draws[rank.rank :: rank.world]),
                )
            step += 1


def one_cycle(
    optimizer: torch.optim.Optimizer, rate: float, *, steps: int, warmup: float
) -> torch.optim.lr_scheduler.OneCycleLR:
    """The rate rises to its peak for a share `warmup` of the steps, then falls to next to nothing.

    Args:
        optimizer: whose rate is set.
        rate: peak.
        steps: in all, at least 1.
        warmup: share of the steps, 0..1.
    """
    # torch divides by the length of the rise less one step, which may be exactly 0.
    if abs(warmup * steps - 1) < 1e-6:
        warmup *= 1.5
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warmup)


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


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all ranks, on any device.

    torch has one of its own for GPUs only (`SyncBatchNorm`); this one serves gloo.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if not self.training:
            return super().forward(x)
        lower = x.dtype
        with _full_precision(x):
            x = x.float()
            count = x.new_full((1,), x.numel() / x.shape[1])
            sums = over_ranks(torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count]))
            mean, square = (sums[:-1] / sums[-1]).chunk(2)
            variance = (square - mean.square()).clamp(min=0)
            self._remember(mean.detach(), variance.detach(), float(sums[-1].detach()))
            factor = self.weight * (variance + self.eps).rsqrt()
            shift = self.bias - mean * factor
            found: Tensor = x * factor.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return found.to(lower)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: float) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / max(1.0, count - 1)), self.momentum)


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(x.device.type, enabled=False)


def synced(network: nn.Module, rank: Rank) -> nn.Module:
    """The network with its batch norms synchronised over the ranks; as it is on one rank."""
    if rank.world == 1:
        return network
    if distributed.get_backend() == "nccl":
        made: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return made
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                same = SyncedBatchNorm(child.num_features, child.eps, child.momentum)
                same.load_state_dict(child.state_dict())
                setattr(parent, name, same)
    return network

"""The training loop, the same for every stage. Every effect enters as an argument."""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sdn.ranks import ALONE, Rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sdn.checkpoint import Checkpoint


class Taken(Protocol):
    """What the loop needs to know of a batch."""

    @property
    def step(self) -> int:
        """Global step that it is for."""

    @property
    def epoch(self) -> int:
        """Epoch of the step."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the samples really read."""


B = TypeVar("B", bound=Taken)


class Trainee(Protocol):
    """What is trained: all of its state, and how far it is."""

    name: str
    """Stage, as in the config."""
    step: int
    """Global steps done."""
    steps: int
    """Of the whole training."""
    images_seen: int
    """Over all ranks."""
    precision: str
    recent_loss: float | None
    """Mean total loss since the last checkpoint; set by the loop."""
    rate: float
    """Learning rate of the last step."""
    device: torch.device
    beside: frozenset[str]
    """Losses of networks that learn beside the one that is trained: no part of its total."""

    def checkpoint(self) -> Checkpoint:
        """All state, on the CPU, independent of what comes next."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one step did."""

    step: int
    """Global steps done."""
    steps: int
    """Global steps of the whole stage."""
    images_seen: int
    """Over all ranks."""
    losses: dict[str, float]
    """`loss/{term}` and `loss/total`, over the global batch."""
    rate: float
    """Learning rate of the step."""
    gradient_norm: float
    images_per_s: float
    """Over all ranks, in the window since the last report."""
    waiting_share: float
    """Share of that window spent waiting for data, 0..1."""
    memory_gib: float
    """Peak of this rank: of the GPU where it has one, else of the process."""
    gpu_share: float | None = None
    """Share of the time in which the GPU computes, 0..1; None where it does not say."""


class LossNotFiniteError(FloatingPointError):
    """A loss, or its gradient, is not finite: going on would spoil the weights."""

    def __init__(self, step: int, terms: tuple[str, ...], name: str, precision: str) -> None:
        self.step, self.terms, self.name, self.precision = step, terms, name, precision
        changes = [f"a lower rate (--set {name}.rate=...)"]
        if name.startswith("stage"):
            changes.append(f"a limit to the gradient (--set {name}.clip=1)")
            if precision != "float32":
                changes.append(f"more exact numbers (--set {name}.precision=float32)")
        super().__init__(
            f"{name}: loss not finite at step {step} in {', '.join(terms)}; the last checkpoint is "
            "good, but the same training would come to the same point again. A change makes it "
            f"another one, with a key of its own: {', or '.join(changes)}"
        )

    def __reduce__(self) -> tuple[type[LossNotFiniteError], tuple[Any, ...]]:
        """Pickle by the parts: the error must cross from a worker to its driver."""
        return type(self), (self.step, self.terms, self.name, self.precision)


def train(
    trainee: Trainee,
    batches: Iterable[B],
    advance: Callable[[B], tuple[dict[str, Tensor], Tensor]],
    *,
    save_every: int,
    save: Callable[[], None],
    report: Callable[[StepReport], None],
    report_every: int = 20,
    consumed: Callable[[B], None] = lambda batch: None,
    rank: Rank = ALONE,
    stopping: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> bool:
    """Train from where the trainee stands to the end of `batches`.

    Args:
        trainee: new, or restored from a checkpoint.
        batches: this rank's, from the trainee's step on.
        advance: one optimizer step on a batch; returns its terms, whose mean over the ranks is
            that of the global batch, and the norm of the gradient.
        save_every: steps between two calls of `save`; the last step is always saved.
        save: stores a checkpoint; called on every rank at the same steps.
        report: receives every `report_every`-th step and the last.
        report_every: steps.
        consumed: receives each batch after its step.
        rank: this one.
        stopping: whether this rank has been asked to stop.
        clock: seconds.

    Returns:
        True at the end; False where a rank was asked to stop, the last step saved on all.

    Raises:
        LossNotFiniteError: a loss is not finite; the text names step and terms.
    """
    window = _Window(trainee, rank, clock)
    iterator = iter(batches)
    while (batch := window.waiting(iterator)) is not None:
        assert batch.step == trainee.step, f"batch of step {batch.step} at step {trainee.step}"
        window.add(*advance(batch))
        consumed(batch)
        done = trainee.step == trainee.steps
        stop = rank.any(stopping()) and not done
        due = trainee.step % save_every == 0 or done or stop
        reported = trainee.step % report_every == 0 or done
        if due or reported:
            losses, norm = window.check()
            if reported:
                report(window.report(losses, norm))
        if due:
            trainee.recent_loss = window.mean_loss()
            save()
        if stop:
            return False
    return True


class _Window:
    """What happened since the last report, its values still where they were computed."""

    def __init__(self, trainee: Trainee, rank: Rank, clock: Callable[[], float]) -> None:
        self._trainee, self._rank, self._clock = trainee, rank, clock
        self._rows: list[Tensor] = []
        self._names: tuple[str, ...] = ()
        self._totals: list[float] = []
        self._start()

    def _start(self) -> None:
        self._began, self._waited = self._clock(), 0.0
        self._seen = self._trainee.images_seen

    def waiting(self, iterator: Any) -> Any:
        """The next batch or None, the time until it came noted."""
        began = self._clock()
        batch = next(iterator, None)
        self._waited += self._clock() - began
        return batch

    def add(self, terms: dict[str, Tensor], norm: Tensor) -> None:
        self._names = tuple(terms)
        # One small tensor a step: its values are fetched from a GPU once a window.
        self._rows.append(torch.stack([*terms.values(), norm]).detach())

    def check(self) -> tuple[dict[str, float], float]:
        """Losses and gradient norm of the last step, after all since the last check were looked at.

        The same on every rank.
        """
        rows = self._rank.mean(torch.stack(self._rows).float()).cpu()
        names = (*self._names, "its gradient")
        first = self._trainee.step - len(rows) + 1
        # In fp16 gradients may overflow: their step is left out and the scale lowered. That must
        # come to an end.
        overflow = self._trainee.precision == "fp16" and (
            len(rows) < 8 or bool(rows[:, -1].isfinite().any())
        )
        for n, row in enumerate(rows):
            finite = row.isfinite().tolist()
            wrong = tuple(
                name
                for name, fine in zip(names, finite, strict=True)
                if not fine and not (overflow and name == names[-1])
            )
            if wrong:
                trainee = self._trainee
                raise LossNotFiniteError(first + n, wrong, trainee.name, trainee.precision)
        own = [n for n, name in enumerate(self._names) if name not in self._trainee.beside]
        self._totals += rows[:, own].sum(1).tolist()
        self._rows = []
        losses = dict(zip(self._names, rows[-1, :-1].tolist(), strict=True))
        return losses, float(rows[-1, -1])

    def report(self, losses: dict[str, float], norm: float) -> StepReport:
        elapsed = max(self._clock() - self._began, 1e-9)
        trainee = self._trainee
        found = StepReport(
            step=trainee.step,
            steps=trainee.steps,
            images_seen=trainee.images_seen,
            losses={f"loss/{name}": value for name, value in losses.items()}
            | {"loss/total": sum(v for name, v in losses.items() if name not in trainee.beside)},
            rate=trainee.rate,
            gradient_norm=norm,
            images_per_s=(trainee.images_seen - self._seen) / elapsed,
            waiting_share=self._waited / elapsed,
            memory_gib=peak_memory_gib(trainee.device),
            gpu_share=_gpu_share(trainee.device),
        )
        self._start()
        return found

    def mean_loss(self) -> float | None:
        """Mean total loss of the steps checked since this was last asked for."""
        totals, self._totals = self._totals, []
        return sum(totals) / len(totals) if totals else None


def gradient_norm_of(module: nn.Module) -> Tensor:
    """Euclidean norm of the gradient of all parameters."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision -> the type of number that networks compute in."""


def choose_precision(wanted: str, device: torch.device) -> str:
    """The precision to compute in: as wanted, or for "auto" bf16 where the device has it natively.

    It depends on the hardware alone: a trial run of a few milliseconds would call it either way.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "float32"
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones lack it
    return "bf16" if found.get("avx512_bf16") or found.get("amx_bf16") else "float32"


def one_cycle(step: int, steps: int, warmup_share: float, floor: float = 0.01) -> float:
    """Share of the peak rate at a step: a straight rise, then half a cosine down to `floor`.

    Args:
        step: from 0.
        steps: in all.
        warmup_share: share of the steps that rise, 0..1.
        floor: share of the peak at the end.
    """
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)  # 0..1
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * along))


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far in GiB: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    # Linux: what getrusage gives there is never less than what the parent held at the fork.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def copied(value: Any) -> Any:
    """A nested state with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [copied(inner) for inner in value]
    return value


def _gpu_share(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except (ModuleNotFoundError, RuntimeError):  # needs a package of NVIDIA's and its driver
        return None

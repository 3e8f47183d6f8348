"""The training loop of a distillation stage. Every effect enters as an argument."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdn.checkpoint import Checkpoint
from sdn.config import to_dict
from sdn.data.images import to_image
from sdn.stages import STAGES, StageName, scales_of
from sdn.teacher import Teacher, channels_last

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sdn.config import StageConfig
    from sdn.data.records import Batch
    from sdn.student import Student, Taps


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one step did, on one rank."""

    step: int
    """Global steps done."""
    steps: int
    """Global steps of the whole stage."""
    images_seen: int
    """Over all ranks."""
    losses: dict[str, float]
    """`loss/{tap}` and `loss/total`, of this rank's share of the batch."""
    rate: float
    """Learning rate of the step."""
    gradient_norm: float
    images_per_s: float
    """Over all ranks, in the window since the last report."""
    waiting_share: float
    """Share of that window spent waiting for data, 0..1."""


def rate_at(step: int, steps: int, config: StageConfig) -> float:
    """Learning rate of global step `step` (from 0) out of `steps`."""
    if config.schedule == "constant":
        return config.rate
    warmup = max(1, round(config.warmup_share * steps))
    if step < warmup:
        return config.rate * (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)  # 0..1
    return config.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * along)))


def average_decay(step: int, steps: int, config: StageConfig) -> float:
    """Decay of the weights' moving average: a horizon in steps, shorter while there are few."""
    horizon = max(1.0, config.average_share * steps)
    return min(1 - 1 / horizon, (1 + step) / (10 + step))


class Trainer:
    """One stage on one rank: student, optimizer, moving average, and the step that moves them."""

    def __init__(
        self,
        stage: StageName,
        student: Student,
        teacher: Teacher,
        config: StageConfig,
        *,
        steps: int,
        tap_means: Mapping[str, float],
        precision: str,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        """Args:
        stage: which losses.
        student: its weights are the start; changed in place.
        teacher: frozen.
        config: of the stage.
        steps: global steps of the whole stage.
        tap_means: see `sdn.stages.scales_of`.
        precision: "float32" or "bf16".
        wrap: makes the student distributed; the identity on one rank.
        """
        self.stage, self.config, self.steps, self.precision = stage, config, steps, precision
        self.device = next(student.parameters()).device
        self.student = channels_last(student)
        self.teacher = teacher
        self.scales = scales_of(config, tap_means)
        self.forward: Callable[[Tensor], Taps] = self.student
        if any(config.weights.of(name) == 0 for name in teacher.names):
            self._freeze_what_no_term_reaches()
        self.forward = wrap(self.student)
        self.optimizer = torch.optim.Adam(
            student.parameters(), lr=config.rate, betas=(0.9, config.beta2), fused=True
        )
        self.average: dict[str, Tensor] | None = None
        if config.average_share > 0:
            self.average = {k: v.detach().clone() for k, v in student.state_dict().items()}
        self.step = 0
        self.images_seen = 0

    def _freeze_what_no_term_reaches(self) -> None:
        """With an image weight of 0, say, stage one leaves the last convolution as it is.

        Distributed training waits for the gradient of every parameter that wants one.
        """
        text = torch.zeros(1, self.student.fc7.in_features, device=self.device)
        side = self.student.top[1] * 2 ** len(self.student.blocks)
        terms = self.losses(text, torch.zeros(1, 3, side, side, device=self.device))
        wanted = [p for p in self.student.parameters() if p.requires_grad]
        total = torch.stack(list(terms.values())).sum()
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        for parameter, gradient in zip(wanted, found, strict=True):
            parameter.requires_grad_(gradient is not None)

    def losses(self, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Weighted terms of the stage, one a tap: scalar float32 each."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return STAGES[self.stage](
                self.forward,
                self.teacher,
                text,
                image,
                weights=self.config.weights,
                scales=self.scales,
            )

    def advance(self, batch: Batch, text: Tensor, images: int) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step; returns the terms and the norm of the gradient.

        Args:
            batch: this rank's share.
            text: (B, D), embeddings of its captions.
            images: images of the global batch.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.step, self.steps, self.config)
        image = to_image(batch.pixels.to(self.device)).contiguous(memory_format=torch.channels_last)
        terms = self.losses(text.to(self.device), image)
        total = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad()
        # The weight makes the mean over ranks the exact mean over an uneven global batch.
        (total * batch.weight).backward()  # type: ignore[no-untyped-call]
        norm = gradient_norm_of(self.student)
        self.optimizer.step()
        self._update_average()
        self.step += 1
        self.images_seen += images
        return {name: term.detach() for name, term in terms.items()}, norm

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        decay = average_decay(self.step, self.steps, self.config)
        state = self.student.state_dict()
        torch._foreach_lerp_(
            list(self.average.values()), [state[k] for k in self.average], 1 - decay
        )

    def weights(self) -> dict[str, Tensor]:
        """The weights to go on with: the moving average where one is kept."""
        return dict(self.average if self.average is not None else self.student.state_dict())

    def checkpoint(self) -> Checkpoint:
        """All state, on the CPU, independent of what the trainer does next."""
        return Checkpoint(
            step=self.step,
            images_seen=self.images_seen,
            student=_copied(self.student.state_dict()),
            average=None if self.average is None else _copied(self.average),
            optimizer=_copied(self.optimizer.state_dict()),
            config=to_dict(self.config),
            precision=self.precision,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was taken."""
        self.student.load_state_dict(checkpoint.student)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if checkpoint.average is not None and self.average is not None:
            for name, value in checkpoint.average.items():
                self.average[name].copy_(value)
        self.step, self.images_seen = checkpoint.step, checkpoint.images_seen
        self.precision = checkpoint.precision


def train(
    trainer: Trainer,
    batches: Iterable[Batch],
    embed: Callable[[tuple[str, ...]], Tensor],
    *,
    images_in: Callable[[int], int],
    save_every: int,
    save: Callable[[Trainer], None],
    report: Callable[[StepReport], None],
    report_every: int = 20,
    consumed: Callable[[Batch], None] = lambda batch: None,
) -> None:
    """Run the stage from where the trainer stands to the end of `batches`.

    Args:
        trainer: new, or restored from a checkpoint.
        batches: this rank's, from the trainer's step on.
        embed: captions -> (B, D).
        images_in: global step -> images in its global batch.
        save_every: steps between two calls of `save`; the last step is always saved.
        save: stores a checkpoint.
        report: receives every `report_every`-th step and the last.
        consumed: receives each batch after its step.

    Raises:
        FloatingPointError: a loss is not finite; the text names step and terms.
    """
    window_start, waited, seen_before = time.perf_counter(), 0.0, trainer.images_seen
    iterator = iter(batches)
    while True:
        began = time.perf_counter()
        batch = next(iterator, None)
        waited += time.perf_counter() - began
        if batch is None:
            return
        assert batch.step == trainer.step, f"batch of step {batch.step} at step {trainer.step}"
        rate = rate_at(trainer.step, trainer.steps, trainer.config)
        terms, norm = trainer.advance(batch, embed(batch.captions), images_in(trainer.step))
        consumed(batch)
        done = trainer.step == trainer.steps
        if trainer.step % report_every == 0 or done:
            losses = _finite({name: float(term) for name, term in terms.items()}, trainer.step)
            elapsed = time.perf_counter() - window_start
            report(
                StepReport(
                    step=trainer.step,
                    steps=trainer.steps,
                    images_seen=trainer.images_seen,
                    losses=losses,
                    rate=rate,
                    gradient_norm=float(norm),
                    images_per_s=(trainer.images_seen - seen_before) / elapsed,
                    waiting_share=waited / elapsed,
                )
            )
            window_start, waited, seen_before = time.perf_counter(), 0.0, trainer.images_seen
        if trainer.step % save_every == 0 or done:
            # The gradient too: the step has already moved the weights by it, on every rank.
            found = {name: float(term) for name, term in terms.items()}
            _finite(found | {"its gradient": float(norm)}, trainer.step)
            save(trainer)


def gradient_norm_of(module: nn.Module) -> Tensor:
    """Euclidean norm of the gradient of all parameters."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


class Embedder:
    """Captions to embeddings, each caption encoded once: the encoder is frozen."""

    def __init__(self, encode: Callable[[list[str]], Tensor], most: int = 200_000) -> None:
        """Args:
        encode: captions -> (B, D).
        most: captions remembered (4 kB each at D = 1024).
        """
        self._encode, self._most = encode, most
        self._known: dict[str, Tensor] = {}

    def __call__(self, captions: tuple[str, ...]) -> Tensor:
        """(B, D) float32."""
        new = sorted({caption for caption in captions if caption not in self._known})
        if len(self._known) + len(new) > self._most:
            self._known.clear()
            new = sorted(set(captions))
        if new:
            self._known.update(zip(new, self._encode(new), strict=True))
        return torch.stack([self._known[caption] for caption in captions])


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def _finite(losses: dict[str, float], step: int) -> dict[str, float]:
    wrong = [name for name, value in losses.items() if not math.isfinite(value)]
    if wrong:
        raise FloatingPointError(
            f"loss not finite at step {step} in {', '.join(wrong)}; the last checkpoint is good: "
            "lower the stage's rate or set its precision to float32"
        )
    named = {f"loss/{name}": value for name, value in losses.items()}
    return named | {"loss/total": sum(losses.values())}


def _copied(value: Any) -> Any:
    """A nested state with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value

"""The distillation of a student: its state, and the step that moves it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sdn.checkpoint import Checkpoint
from sdn.compiling import compiled
from sdn.config import to_dict
from sdn.data.images import to_image
from sdn.noise import coded
from sdn.ranks import ALONE, Rank
from sdn.stages import STAGES, StageName, scales_of
from sdn.teacher import FastTeacher, Teacher, channels_last
from sdn.training import DTYPES, copied, gradient_norm_of, one_cycle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sdn.config import StageConfig
    from sdn.data.records import Batch
    from sdn.student import Student, Taps


def rate_at(step: int, steps: int, config: StageConfig) -> float:
    """Learning rate of global step `step` (from 0) out of `steps`.

    Departs from the paper where the schedule is not "constant": a short training ends better with
    a rate that falls.
    """
    if config.schedule == "constant":
        return config.rate
    floor = 1.0 if config.schedule == "warm-up" else 0.01
    return config.rate * one_cycle(step, steps, config.warmup_share, floor)


def average_decay(step: int, steps: int, config: StageConfig) -> float:
    """Decay of the weights' moving average: a horizon in steps, shorter while there are few.

    Departs from the paper, which keeps no average (`average_share` 0): it evens out single steps.
    """
    horizon = max(1.0, config.average_share * steps)
    return min(1 - 1 / horizon, (1 + step) / (10 + step))


def step_names(batch: Batch) -> list[str]:
    """A name for each row of a batch in its step, the same on any rank; padded rows have theirs."""
    keys = [*batch.keys, *map(str, range(len(batch.keys), len(batch.pixels)))]
    return [f"{batch.step}/{key}" for key in keys]


class Trainer:
    """One stage on one rank: student, optimizer, moving average, and the step that moves them."""

    beside: frozenset[str] = frozenset()

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
        rank: Rank = ALONE,
    ) -> None:
        """Args:
        stage: which losses.
        student: its weights are the start; changed in place.
        teacher: frozen.
        config: of the stage.
        steps: global steps of the whole stage.
        tap_means: see `sdn.stages.scales_of`.
        precision: "float32", "bf16" or "fp16".
        rank: where it runs.
        """
        self.name: str = stage
        self.config, self.steps, self.precision = config, steps, precision
        self.device = next(student.parameters()).device
        # Stage three has terms of its own beside those of stage two.
        third = stage == "stage_three"
        losses = STAGES["stage_two" if third else stage]
        self._losses = compiled(losses, "off" if third else config.compile, self.device)
        self.student = channels_last(student)
        # The compute precision's own copy; the teacher itself is left as it is.
        self.teacher = FastTeacher(teacher, DTYPES[precision])
        self.scales = scales_of(config, tap_means)
        self.forward: Callable[..., Taps] = self.student
        if any(config.weights.of(name) == 0 for name in teacher.names):
            self._freeze_what_no_term_reaches()
        self.forward = rank.wrap(self.student)
        self.optimizer = torch.optim.Adam(
            student.parameters(), lr=config.rate, betas=(0.9, config.beta2), fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.average: dict[str, Tensor] | None = None
        if config.average_share > 0:
            self.average = {k: v.detach().clone() for k, v in student.state_dict().items()}
        # The same on every rank: whatever is drawn is drawn for the whole global batch.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.images_seen = 0
        self.rate = config.rate
        self.recent_loss: float | None = None

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

    def _precise(self) -> torch.autocast:
        """The compute precision, for what is done inside."""
        return torch.autocast(
            self.device.type, DTYPES[self.precision], enabled=self.precision != "float32"
        )

    def losses(self, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Weighted terms of the stage, one a tap: scalar float32 each."""
        with self._precise():
            found: dict[str, Tensor] = self._losses(
                self.forward,
                self.teacher,
                text,
                image,
                weights=self.config.weights,
                scales=self.scales,
                kind=self.config.distance,
            )
        return found

    def advance(self, batch: Batch, text: Tensor, images: int) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step; returns the terms and the norm of the gradient.

        Args:
            batch: this rank's share.
            text: (B, D), embeddings of its captions.
            images: images of the global batch.

        Returns:
            The terms, whose mean over the ranks is that of the global batch, and the norm of the
            gradient before it is clipped.
        """
        self.rate = rate_at(self.step, self.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad()
        found: dict[str, Tensor] = {}
        text = self.coded(batch, text)
        for part, pixels, share, last in self._parts(batch, text):
            image = to_image(pixels).contiguous(memory_format=torch.channels_last)
            with nullcontext() if last else self._without_exchange():
                terms = self.losses(part, image)
                # The weight makes the mean over ranks the exact mean over an uneven global batch.
                total = torch.stack(list(terms.values())).sum() * (batch.weight * share)
                self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            for name, term in terms.items():
                value = term.detach() * (batch.weight * share)
                found[name] = found[name] + value if name in found else value
        return found, self._move(images)

    def _move(self, images: int) -> Tensor:
        """Move the student along the gradient that it has; the norm of that before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm_of(self.student)
        if self.config.clip is not None:
            # Departs from the paper: one bad batch cannot undo what was learned.
            nn.utils.clip_grads_with_norm_(self.student.parameters(), self.config.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._update_average()
        self.step += 1
        self.images_seen += images
        return norm

    def coded(self, batch: Batch, text: Tensor, of: str = "") -> Tensor:
        """The embeddings with the noise of this step beside them: (B, D + Z).

        Args:
            batch: whose captions they are.
            text: (B, D).
            of: another word gives other noise.
        """
        names = [f"{of}{name}" for name in step_names(batch)]
        return coded(text, self.student.noise, names, seed=self.config.seed)

    def _parts(self, batch: Batch, text: Tensor) -> Iterator[tuple[Tensor, Tensor, float, bool]]:
        """Embeddings, pixels, share of the batch, and whether it is the last part."""
        text, pixels = text.to(self.device), batch.pixels.to(self.device, non_blocking=True)
        count = min(self.config.accumulate, len(pixels))
        parts = zip(text.tensor_split(count), pixels.tensor_split(count), strict=True)
        for number, (words, images) in enumerate(parts, start=1):
            yield words, images, len(images) / len(pixels), number == count

    def _without_exchange(self) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step, in its last part."""
        if self.forward is self.student:
            return nullcontext()
        return cast("AbstractContextManager[None]", cast("Any", self.forward).no_sync())

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
            steps=self.steps,
            images_seen=self.images_seen,
            model=copied(self.student.state_dict()),
            average=None if self.average is None else copied(self.average),
            optimizer=copied(self.optimizer.state_dict()),
            scaler=self.scaler.state_dict() if self.scaler.is_enabled() else None,
            generator=self.generator.get_state(),
            config=to_dict(self.config),
            precision=self.precision,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was taken."""
        self.student.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if checkpoint.scaler is not None:
            self.scaler.load_state_dict(checkpoint.scaler)
        if checkpoint.generator is not None:
            self.generator.set_state(checkpoint.generator)
        if checkpoint.average is not None and self.average is not None:
            for name, value in checkpoint.average.items():
                self.average[name].copy_(value)
        self.step, self.images_seen = checkpoint.step, checkpoint.images_seen
        self.precision = checkpoint.precision

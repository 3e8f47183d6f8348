"""One trial of a search: a short training, looked at when so many images have been seen."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from sdn.data.dataset import open_dataset
from sdn.ranks import ALONE, Rank
from sdn.space import own_share
from sdn.stage_run import images_of, new_student, open_stage, stage_plan, steps_of
from sdn.training import copied, train

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sdn.checkpoint import Checkpoint
    from sdn.config import RunConfig, SearchConfig
    from sdn.stage_run import StageInputs
    from sdn.stages import StageName
    from sdn.student import Student
    from sdn.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Reached:
    """A trial at a rung, or at its end."""

    stage: StageName
    images_seen: int
    """Over all ranks and both stages."""
    seconds: float
    """Of training since the last rung."""
    done: bool
    """Whether the trial is at its end."""
    weights: Callable[[], dict[str, Tensor]]
    """The student's weights there, on the CPU."""
    checkpoint: Callable[[], Checkpoint]
    """All state there."""


def rungs_of(search: SearchConfig) -> list[int]:
    """Images seen at which a trial is looked at, rising; the last is its whole length."""
    if search.scheduler == "none":
        return [search.images]
    if search.scheduler == "pbt":
        every = first_rung(search)
        return [*range(every, search.images, every), search.images]
    found, rung = [], float(first_rung(search))
    while math.ceil(rung) < search.images:
        found.append(math.ceil(rung))
        rung *= search.reduction
    return [*found, search.images]


def first_rung(search: SearchConfig) -> int:
    """Images seen at the first rung; see `SearchConfig.first_images`."""
    parts = 4 if search.scheduler == "pbt" else 9
    return search.first_images or math.ceil(search.images / parts)


def trial_config(config: RunConfig, samples: int) -> RunConfig:
    """The config whose stages have the length of a trial.

    Args:
        config: of the run, with the trial's own values.
        samples: of the training split.
    """
    total = config.search.images / samples  # passes
    share = own_share(config) if config.search.stage_one else 0.0
    one = dataclasses.replace(config.stage_one, epochs=total * share)
    two = dataclasses.replace(config.stage_two, epochs=total * (1 - share))
    return dataclasses.replace(config, stage_one=one, stage_two=two)


def run_trial(
    config: RunConfig,
    inputs: StageInputs,
    reached: Callable[[Reached], None],
    *,
    resume: tuple[StageName, Checkpoint] | None = None,
    rank: Rank = ALONE,
) -> None:
    """Train a trial to its end.

    Args:
        config: of the run, with the trial's own values (see `sdn.space.with_values`).
        inputs: what stage two reads; `start` is not read where stage one is searched too.
        reached: called on every rank at each rung; may end the trial by an exception.
        resume: stage and checkpoint of an earlier rung, to go on from there; `reached` is called
            for it again.
        rank: this one.

    Raises:
        LossNotFiniteError: the values cannot be trained with.
    """
    config = trial_config(config, open_dataset(inputs.data).samples("train"))
    stages: tuple[StageName, ...] = ("stage_two",)
    student: Student | None = None
    before, spent = 0, 0.0
    if config.search.stage_one:
        inputs = dataclasses.replace(inputs, start=None)
        stages = ("stage_one", "stage_two")
        if resume is not None and resume[0] == "stage_two":
            stages, before = ("stage_two",), _images(config, inputs)
    rungs = rungs_of(config.search)
    for name in stages:
        checkpoint = resume[1] if resume is not None and resume[0] == name else None
        work = open_stage(name, config, inputs, checkpoint, rank, student)
        trainer = cast("Trainer", work.trainee)
        batches = iter(work.batches)

        def look(
            seconds: float,
            *,
            name: StageName = name,
            trainer: Trainer = trainer,
            before: int = before,
        ) -> None:
            reached(
                Reached(
                    stage=name,
                    images_seen=before + trainer.images_seen,
                    seconds=seconds,
                    done=trainer.step == trainer.steps and name == stages[-1],
                    weights=partial(_on_cpu, trainer),
                    checkpoint=trainer.checkpoint,
                )
            )

        if checkpoint is not None:  # whoever stopped it may not have heard of this rung
            look(0.0)
        while trainer.step < trainer.steps:
            began = time.monotonic()
            seen = before + trainer.images_seen
            rung = next((rung for rung in rungs[:-1] if rung > seen), math.inf)
            train(
                trainer,
                batches,
                work.advance,
                save_every=trainer.steps,
                save=lambda: None,
                report=lambda step: None,
                rank=rank,
                stopping=partial(_has_seen, trainer, rung - before),
            )
            spent += time.monotonic() - began
            if before + trainer.images_seen >= rung or name == stages[-1]:
                look(spent)
                spent = 0.0
        before += trainer.images_seen
        student = new_student(config)
        student.load_state_dict(_on_cpu(trainer))


def _has_seen(trainer: Trainer, images: float) -> bool:
    return trainer.images_seen >= images


def _on_cpu(trainer: Trainer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = copied(trainer.weights())  # the trainer's own would go on changing
    return found


def _images(config: RunConfig, inputs: StageInputs) -> int:
    """Images that the whole of stage one sees."""
    plan = stage_plan(config, config.stage_one, inputs.data)
    return sum(images_of(plan, step) for step in range(steps_of(config.stage_one, plan)))

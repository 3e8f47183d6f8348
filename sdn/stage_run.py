"""One distillation stage from folders to a model folder, on one rank of any number."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from sdn.adversarial import AdversarialTrainer
from sdn.captions import CharCnnRnn, open_encoder
from sdn.config import AdversarialConfig, to_dict
from sdn.data.dataset import open_dataset
from sdn.data.loader import batches
from sdn.data.plan import Plan
from sdn.data.reading import ShardReader
from sdn.ranks import ALONE, Rank
from sdn.running import Work
from sdn.sampling import ENCODER, open_student, save_synthesizer
from sdn.student import Student
from sdn.taps import blocks_of
from sdn.teacher import open_teacher
from sdn.trainer import Trainer
from sdn.training import choose_precision, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from sdn.checkpoint import Checkpoint
    from sdn.config import RunConfig, StageConfig
    from sdn.data.dataset import DataSet
    from sdn.data.files import Files
    from sdn.data.records import Batch
    from sdn.stages import StageName
    from sdn.teacher import Teacher
    from sdn.training import StepReport

TEACHER, TAP_MEANS = "teacher.pt", "tap-means.json"
CONFIG = "config.json"
"""Of a model folder: the resolved config of the run that made it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageInputs:
    """What a stage reads: local folders, and a data set anywhere."""

    data: DataSet | Files | Path
    """Prepared data set: manifest, shards, index."""
    teacher: Path
    """`teacher.pt` and `tap-means.json`."""
    captions: Path
    """`captions.safetensors`."""
    start: Path | None = None
    """Model folder whose student the stage starts from; None starts from initial weights."""


def stage_plan(config: RunConfig, stage: StageConfig, data: DataSet | Files | Path) -> Plan:
    """Who reads what when in this stage.

    Raises:
        ValueError: no data set there.
    """
    return Plan(
        shard_samples=open_dataset(data).shards("train").samples,
        seed=stage.seed,
        lanes=config.lanes,
        global_batch=stage.global_batch,
    )


def steps_of(stage: StageConfig, plan: Plan) -> int:
    """Global steps of the whole stage; at least one unless its length is 0."""
    if stage.epochs == 0:
        return 0
    return max(1, round(stage.epochs * plan.steps_per_epoch))


def images_of(plan: Plan, step: int) -> int:
    """Images in the global batch of a global step; fewer in the last of an epoch."""
    along = step % plan.steps_per_epoch
    return min(plan.global_batch, plan.samples - along * plan.global_batch)


def keys_of(data: DataSet | Files | Path, split: str) -> Iterator[str]:
    """The keys of all samples of a split, from the indexes of its shards.

    Raises:
        DamagedSample: an index is not what was written.
    """
    dataset = open_dataset(data)
    reader = ShardReader(dataset, split, cache_gib=0)
    try:
        for number in range(len(reader.shards.samples)):
            yield from reader.index(number).keys
    finally:
        reader.close()


def new_student(config: RunConfig) -> Student:
    """The untrained student of a run."""
    width = config.teacher.width * config.student.width
    return Student(
        blocks_of(config.teacher.arch, width),
        resolution=config.data.resolution,
        text_dim=config.captions.dim,
        width=width,
        noise=config.student.noise,
        condition=config.student.condition,
        leak=config.student.leak,
        chroma=config.student.chroma,
        init=config.student.init,
        seed=config.stage_one.seed,
    )


def new_trainer(
    name: StageName, student: Student, teacher: Teacher, stage: StageConfig, **more: Any
) -> Trainer:
    """The trainer of a stage; arguments as of `Trainer`."""
    if isinstance(stage, AdversarialConfig):
        return AdversarialTrainer(student, teacher, stage, **more)
    return Trainer(name, student, teacher, stage, **more)


def open_stage(
    name: StageName,
    config: RunConfig,
    inputs: StageInputs,
    resume: Checkpoint | None = None,
    rank: Rank = ALONE,
    student: Student | None = None,
) -> Work[Batch]:
    """A distillation stage, ready to be trained from where it stands.

    Args:
        name: which stage.
        config: of the run; its part of the stage's name holds.
        inputs: what it reads.
        resume: where to go on; None starts from `inputs.start`.
        rank: where it runs.
        student: to start from, in place of the one in `inputs.start`.

    Raises:
        ValueError: damaged or missing inputs, or an impossible number of ranks.
    """
    stage: StageConfig = getattr(config, name)
    plan = stage_plan(config, stage, inputs.data)
    if student is None:
        student = new_student(config) if inputs.start is None else open_student(inputs.start)
    precision = stage.precision if resume is None else resume.precision
    trainer = new_trainer(
        name,
        student.to(rank.device),
        open_teacher(inputs.teacher / TEACHER).to(rank.device),
        stage,
        steps=steps_of(stage, plan),
        tap_means=json.loads((inputs.teacher / TAP_MEANS).read_text()),
        precision=rank.agree(choose_precision(precision, rank.device)),
        rank=rank,
    )
    if resume is not None:
        trainer.restore(resume)
    source = batches(
        inputs.data,
        "train",
        plan=plan,
        seed=stage.seed,
        start_step=trainer.step,
        steps=trainer.steps - trainer.step,
        rank=rank.rank,
        world=rank.world,
    )
    encoder = open_encoder(inputs.captions / ENCODER)
    if isinstance(encoder, CharCnnRnn):
        encoder.to(rank.device)
    embed = Embedder(
        lambda captions: encoder.encode(captions).cpu(), one_by_one=rank.device.type == "cpu"
    )
    return Work(
        trainee=trainer,
        batches=source,
        advance=lambda batch: trainer.advance(
            batch, embed(batch.captions), images_of(plan, trainer.step)
        ),
        save_every=max(1, stage.checkpoint_images // stage.global_batch),
        keep=stage.keep,
    )


def run_stage(
    name: StageName,
    config: RunConfig,
    inputs: StageInputs,
    *,
    save: Callable[[Trainer], None] = lambda trainer: None,
    report: Callable[[StepReport], None] = lambda step: None,
    resume: Checkpoint | None = None,
    rank: Rank = ALONE,
    consumed: Callable[[Batch], None] = lambda batch: None,
    report_every: int = 20,
) -> Trainer:
    """Train one stage to its end and return the trainer with the finished student.

    Args:
        name, config, inputs, resume, rank: see `open_stage`.
        save: stores a checkpoint; called on every rank at the same steps.
        report: receives the progress.
        consumed: receives each batch after the step that it was consumed in.
        report_every: steps between two reports.

    Raises:
        ValueError: as `open_stage`.
        LossNotFiniteError: the loss is not finite.
    """
    work = open_stage(name, config, inputs, resume, rank)
    trainer = cast("Trainer", work.trainee)
    if trainer.steps == 0:  # nothing to train: what the stage starts from is its result
        save(trainer)
    train(
        trainer,
        work.batches,
        work.advance,
        save_every=work.save_every,
        save=lambda: save(trainer),
        report=report,
        report_every=report_every,
        consumed=consumed,
        rank=rank,
    )
    return trainer


class Embedder:
    """Captions to embeddings, each caption encoded once: the encoder is frozen."""

    def __init__(
        self,
        encode: Callable[[list[str]], Tensor],
        most: int = 200_000,
        *,
        one_by_one: bool = False,
    ) -> None:
        """Args:
        encode: captions -> (B, D).
        most: captions remembered (4 kB each at D = 1024).
        one_by_one: so that no bit of an embedding depends on the captions beside it, which are
            others after a training was interrupted.
        """
        self._encode, self._most = encode, most
        if one_by_one:
            self._encode = lambda captions: torch.cat([encode([one]) for one in captions])
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


def write_model(
    folder: Path, config: RunConfig, captions: Path, weights: dict[str, torch.Tensor]
) -> None:
    """Write a model folder: the finished student, the caption encoder it reads, and the config."""
    (folder / CONFIG).write_text(json.dumps(to_dict(config), indent=2))
    student = new_student(config)
    save_synthesizer(
        folder,
        open_encoder(captions / ENCODER),
        weights,
        {
            "blocks": [list(block) for block in student.blocks],
            "resolution": config.data.resolution,
            "text_dim": config.captions.dim,
            "width": config.teacher.width * config.student.width,
            "noise": student.noise,
            "noise_scale": config.student.noise_scale,
            "condition": student.condition,
            "leak": student.leak,
            "chroma": student.chroma,
        },
        config.captions.max_chars,
    )

"""The two stages before distillation, from folders to folders: the teacher and the captions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from sdn.caption_fitting import (
    caption_batches,
    check_captions,
    finished_encoder,
    new_caption_fit,
)
from sdn.captions import normalise, save_encoder
from sdn.convention_check import check_convention
from sdn.data.dataset import open_dataset
from sdn.data.loader import load_split
from sdn.data.reading import SplitArrays
from sdn.evaluation import probe_embedding
from sdn.metrics import tap_features
from sdn.running import Work
from sdn.sampling import ENCODER
from sdn.stage_run import TAP_MEANS, TEACHER
from sdn.teacher import FastTeacher, drawn_teacher, load_weights, open_teacher, save_teacher
from sdn.teacher_fitting import (
    Targets,
    head_accuracy,
    new_classifier,
    new_teacher_fit,
    tap_means,
    targets_of,
    teacher_batches,
)
from sdn.training import DTYPES, choose_precision, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdn.checkpoint import Checkpoint
    from sdn.config import CaptionConfig, TeacherConfig
    from sdn.data.dataset import DataSet
    from sdn.data.files import Files
    from sdn.fit import FitBatch
    from sdn.ranks import Rank
    from sdn.running import Opener
    from sdn.training import StepReport

    Weights = dict[str, torch.Tensor]
    Report = Callable[[float, str], None]
    Fitter = Callable[[Opener], Weights]
    """Trains what an opener opens to its end and returns the weights."""

_JUDGED = 2048
"""Images that a fitted teacher is asked about: 35,000 would take a core a quarter of an hour."""


def open_teacher_fit(
    config: TeacherConfig, data: DataSet | Files | Path, resume: Checkpoint | None, rank: Rank
) -> Work[FitBatch]:
    """The fit of the teacher on the training split, ready to go on.

    Raises:
        ValueError: nothing to fit on.
    """
    split = load_split(data, "train")
    precision = choose_precision("auto", rank.device) if resume is None else resume.precision
    fit = new_teacher_fit(
        split.pixels,
        targets_of(split.labels, split.captions),
        config,
        rank=rank,
        precision=rank.agree(precision),
    )
    if resume is not None:
        fit.restore(resume)
    return Work(
        trainee=fit,
        batches=teacher_batches(split.keys, config, fit.step, rank),
        advance=fit.advance,
        save_every=max(1, config.checkpoint_images // config.batch),
    )


def open_caption_fit(
    config: CaptionConfig,
    data: DataSet | Files | Path,
    teacher: Path,
    resume: Checkpoint | None,
    rank: Rank,
    report: Report = lambda share, text: None,
) -> Work[FitBatch]:
    """The fit of the caption encoder against the teacher, ready to go on.

    Args:
        config, resume, rank: see `sdn.running.Opener`.
        data: prepared data set.
        teacher: folder of the teacher.
        report: called with (share, text) while the teacher reads all images, before the first step.

    Raises:
        ValueError: too few images, or an encoder that is not fitted.
    """
    split = load_split(data, "train")
    check_captions(split.captions)
    precision = rank.agree(choose_precision("auto", rank.device))
    reader = FastTeacher(open_teacher(teacher / TEACHER).to(rank.device), DTYPES[precision])
    total = len(split.pixels)
    features = tap_features(
        reader,
        split.pixels,
        device=rank.device,
        report=lambda n: report(n / total, f"the teacher has read {n:,} of {total:,} images"),
    )
    fit = new_caption_fit(split.captions, features, config, rank)
    if fit is None:
        raise ValueError(f"captions.encoder={config.encoder} is not fitted")
    if resume is not None:
        fit.restore(resume)
    return Work(
        trainee=fit,
        batches=caption_batches(split.keys, split.captions, config, fit.step, rank),
        advance=fit.advance,
        save_every=max(1, config.checkpoint_images // config.batch),
    )


def fit_here(report: Report = lambda share, text: None) -> Fitter:
    """Fits in this process and writes nothing down; for `write_teacher` and `write_captions`."""
    from sdn.ranks import Rank

    def fitted(opener: Opener) -> Weights:
        work = opener(None, Rank())

        def tell(step: StepReport) -> None:
            report(step.step / step.steps, f"loss {step.losses['loss/total']:.3f}")

        train(
            work.trainee,
            work.batches,
            work.advance,
            save_every=work.trainee.steps,
            save=lambda: None,
            report=tell,
        )
        return work.trainee.checkpoint().weights()

    return fitted


def write_teacher(
    folder: Path,
    data: DataSet | Files | Path,
    config: TeacherConfig,
    *,
    fit: Fitter | None = None,
    report: Report = lambda share, text: None,
) -> dict[str, Any]:
    """The teacher stage: load, fit or draw the teacher and write it with its mean activations.

    Args:
        folder: receives `teacher.pt` and `tap-means.json`.
        data: prepared data set.
        config: see there.
        fit: how it is fitted, on one rank or many; None fits it in this process.
        report: called with (share done, text).

    Returns:
        `sha256` of the weights, and for a fitted teacher `accuracy` of each head on images of the
        validation split (of the training split where there is none), 0..1.

    Raises:
        FileNotFoundError, ValueError: see `sdn.teacher.load_weights`, and
            `sdn.convention_check.check_convention`.
    """
    result: dict[str, Any] = {"fitted": config.weights is None}
    if config.weights is not None:
        teacher = load_weights(config)
        train_split = load_split(data, "train")
        check_convention(teacher, train_split.pixels)
    elif config.epochs == 0:
        teacher = drawn_teacher(config)
        train_split = load_split(data, "train")
        result["fitted"] = False
    else:
        fit = fit_here(report) if fit is None else fit
        weights = fit(lambda resume, rank: open_teacher_fit(config, data, resume, rank))
        train_split = load_split(data, "train")
        targets = targets_of(train_split.labels, train_split.captions)
        model = new_classifier(targets, config, train_split.pixels.shape[-1])
        model.load_state_dict(weights)
        model.eval()
        result["classes"] = {head: len(names) for head, names in targets.classes.items()}
        held = _judged(data, train_split)
        report(1.0, f"looks at {len(held.keys):,} images")
        result["accuracy"] = head_accuracy(model, held.pixels, targets_like(targets, held))
        report(1.0, f"accuracy {_percentages(result['accuracy'])}")
        teacher = model.fold()
    means = tap_means(teacher, train_split.pixels[:1024])
    (folder / TAP_MEANS).write_text(json.dumps(means, indent=2))
    return result | {"sha256": save_teacher(teacher, folder / TEACHER)}


def _judged(data: DataSet | Files | Path, train_split: SplitArrays) -> SplitArrays:
    """Images to ask a fitted teacher about, spread over the validation or the training split."""
    validated = open_dataset(data).samples("validation")
    held = load_split(data, "validation") if validated else train_split
    count = min(_JUDGED, len(held.keys))
    rows = [i * len(held.keys) // count for i in range(count)]
    return SplitArrays(
        keys=tuple(held.keys[row] for row in rows),
        pixels=held.pixels[rows],
        captions=tuple(held.captions[row] for row in rows),
        labels=tuple(held.labels[row] for row in rows),
    )


def targets_like(targets: Targets, split: SplitArrays) -> Targets:
    """The same heads and classes for the samples of another split."""
    values = {}
    for head, names in targets.classes.items():
        if targets.values[head].is_floating_point():
            words = [set(" ".join(map(normalise, found)).split()) for found in split.captions]
            values[head] = torch.tensor([[float(w in found) for w in names] for found in words])
        else:
            number = {name: i for i, name in enumerate(names)}
            values[head] = torch.tensor(
                [number.get(found.get(head, ""), -100) for found in split.labels]
            )
    return Targets(classes=targets.classes, values=values)


def write_captions(
    folder: Path,
    data: DataSet | Files | Path,
    teacher: Path,
    config: CaptionConfig,
    *,
    fit: Fitter | None = None,
    report: Report = lambda share, text: None,
) -> dict[str, Any]:
    """The captions stage: fit the encoder against the teacher, write it, probe it.

    Args:
        folder: receives `captions.safetensors`.
        data: prepared data set.
        teacher: folder of the teacher.
        config: see there.
        fit: how it is fitted, on one rank or many; None fits it in this process.
        report: called with (share done, text).

    Returns:
        `probes`: label -> accuracy of a linear probe on held-out captions, 0..1.
    """
    weights = None
    if config.encoder == "char-cnn-rnn":
        fit = fit_here(report) if fit is None else fit
        weights = fit(
            lambda resume, rank: open_caption_fit(
                config, data, teacher, resume, rank, lambda _, text: report(0.0, text)
            )
        )
    captions = load_split(data, "train").captions
    save_encoder(finished_encoder(captions, config, weights), folder / ENCODER)
    try:
        probes = probe_embedding(data, folder)
    except ModuleNotFoundError as error:  # the encoder does not need it
        report(1.0, f"not probed: pip install {error.name}")
        return {"probes": {}}
    if probes:
        report(1.0, f"probes {_percentages(probes)}")
    return {"probes": probes}


def _percentages(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())

"""The two stages before distillation, from folders to folders: the teacher and the captions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from sdn.caption_fitting import fit_captions
from sdn.captions import normalise, save_encoder
from sdn.data.dataset import open_dataset
from sdn.data.loader import load_split
from sdn.evaluation import probe_embedding
from sdn.metrics import tap_features
from sdn.sampling import ENCODER
from sdn.stage_run import TAP_MEANS, TEACHER
from sdn.teacher import load_weights, open_teacher, save_teacher
from sdn.teacher_fitting import (
    Classifier,
    Targets,
    fit_teacher,
    head_accuracy,
    tap_means,
    targets_of,
)
from sdn.training import choose_precision

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdn.config import CaptionConfig, TeacherConfig
    from sdn.data.dataset import DataSet
    from sdn.data.files import Files
    from sdn.data.reading import SplitArrays


def write_teacher(
    folder: Path,
    data: DataSet | Files | Path,
    config: TeacherConfig,
    *,
    threads: int,
    report: Callable[[float, str], None] = lambda share, text: None,
) -> dict[str, Any]:
    """The teacher stage: load or fit the teacher and write it with its mean activations.

    Args:
        folder: receives `teacher.pt` and `tap-means.json`.
        data: prepared data set.
        config: see there.
        threads: CPU threads to use.
        report: called with (share done, text).

    Returns:
        `sha256` of the weights, and for a fitted teacher `accuracy` of each head on the validation
        split (on the training split where there is none), 0..1.
    """
    torch.set_num_threads(threads)
    train = load_split(data, "train")
    result: dict[str, Any] = {"fitted": config.weights is None}
    if config.weights is not None:
        teacher = load_weights(config)
    else:
        targets = targets_of(train.labels, train.captions)
        steps = config.epochs * (len(train.keys) // min(config.batch, len(train.keys)))
        bf16 = choose_precision("auto", torch.device("cpu")) == "bf16"
        model = fit_teacher(
            train.pixels,
            targets,
            config,
            report=lambda step, loss: report(step / steps, f"loss {loss:.3f}"),
            bf16=bf16,
        )
        result["classes"] = {head: len(names) for head, names in targets.classes.items()}
        result["accuracy"] = _held_out_accuracy(model, targets, data)
        report(1.0, f"accuracy {_percentages(result['accuracy'])}")
        teacher = model.fold()
    means = tap_means(teacher, train.pixels[:1024])
    (folder / TAP_MEANS).write_text(json.dumps(means, indent=2))
    return result | {"sha256": save_teacher(teacher, folder / TEACHER)}


def _held_out_accuracy(
    model: Classifier, targets: Targets, data: DataSet | Files | Path
) -> dict[str, float]:
    split = "validation" if open_dataset(data).samples("validation") else "train"
    held = load_split(data, split)
    return head_accuracy(model, held.pixels, targets_like(targets, held))


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
    threads: int,
    report: Callable[[float, str], None] = lambda share, text: None,
) -> dict[str, Any]:
    """The captions stage: fit the encoder against the teacher, write it, probe it.

    Args:
        folder: receives `captions.pt`.
        data: prepared data set.
        teacher: folder of the teacher.
        config: see there.
        threads: CPU threads to use.
        report: called with (share done, text).

    Returns:
        `probes`: label -> accuracy of a linear probe on held-out captions, 0..1.
    """
    torch.set_num_threads(threads)
    train = load_split(data, "train")
    features = tap_features(open_teacher(teacher / TEACHER), train.pixels)
    steps = config.epochs * (len(train.keys) // min(config.batch, len(train.keys)))
    encoder = fit_captions(
        train.captions,
        features,
        config,
        report=lambda step, loss: report(step / steps, f"loss {loss:.3f}"),
    )
    save_encoder(encoder, folder / ENCODER)
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

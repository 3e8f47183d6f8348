"""Scores of a model on held-out captions, beside what would be scored without it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdn.baselines import nearest_by_tone
from sdn.captions import open_encoder
from sdn.data.dataset import open_dataset
from sdn.data.loader import load_split
from sdn.data.records import SPLITS
from sdn.metrics import (
    blurred,
    identity_groups,
    kernel_distance,
    pixel_features,
    probe_accuracy,
    retrieval,
    tap_features,
)
from sdn.sampling import ENCODER, Synthesizer, open_synthesizer
from sdn.stage_run import TEACHER, new_student
from sdn.teacher import open_teacher

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sdn.captions import CharCnnRnn, SentenceEncoder
    from sdn.config import RunConfig
    from sdn.data.dataset import DataSet
    from sdn.data.files import Files
    from sdn.data.reading import SplitArrays
    from sdn.stage_run import StageInputs
    from sdn.teacher import Teacher

SPACES = ("pixels", "teacher")
"""Where images are compared: 32x32 pixels, and the teacher's pools."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found."""

    scores: dict[str, dict[str, Any]]
    """Row (a model or a baseline) -> `{space}/{score}` -> value; models have `kernel_distance`."""
    captions: tuple[str, ...]
    """Those drawn, one an image."""
    images: dict[str, Tensor]
    """`real` and each model -> (N, 3, H, W) uint8."""


class Gallery:
    """All images of a data set, in both spaces, identical ones counted as one."""

    def __init__(self, splits: Mapping[str, SplitArrays], teacher: Teacher) -> None:
        self.first = {}
        start = 0
        for name, split in splits.items():
            self.first[name] = start
            start += len(split.keys)
        self.pixels = torch.cat([split.pixels for split in splits.values()])
        self.groups = identity_groups(self.pixels)
        self.teacher = teacher
        self.spaces = {space: self.features(space, self.pixels) for space in SPACES}

    def features(self, space: str, pixels: Tensor) -> Tensor:
        """(N, F) float32 of (N, 3, H, W) uint8 in one of `SPACES`."""
        return pixel_features(pixels) if space == "pixels" else tap_features(self.teacher, pixels)

    def scores(self, pixels: Tensor, truth: Tensor) -> dict[str, Any]:
        """`{space}/{score}` of drawn images, (Q, 3, H, W) uint8, whose true rows are `truth`."""
        found: dict[str, Any] = {}
        for space in SPACES:
            result = retrieval(self.features(space, pixels), self.spaces[space], truth, self.groups)
            found |= {f"{space}/{k}": v for k, v in dataclasses.asdict(result).items()}
        return found


def synthesizer_of(
    config: RunConfig, encoder: CharCnnRnn | SentenceEncoder, weights: dict[str, Tensor] | None
) -> Synthesizer:
    """A model from weights in memory; None gives the untrained student."""
    student = new_student(config)
    if weights is not None:
        student.load_state_dict(weights)
    return Synthesizer(
        encoder=encoder,
        student=student.requires_grad_(requires_grad=False).eval(),
        resolution=config.data.resolution,
        max_chars=config.captions.max_chars,
    )


def validation_score(config: RunConfig, inputs: StageInputs, weights: dict[str, Tensor]) -> float:
    """Mean reciprocal rank of the true image for validation captions, 0..1.

    It does not depend on the loss weights, so that trials with different weights can be ranked. The
    test split is not read: the gallery is training and validation images, compared at 32x32.
    """
    splits = {name: load_split(inputs.data, name) for name in ("train", "validation")}
    held = splits["validation"]
    count = min(config.search.captions, len(held.keys))
    model = synthesizer_of(config, open_encoder(inputs.captions / ENCODER), weights)
    pixels = torch.cat([split.pixels for split in splits.values()])
    found = retrieval(
        pixel_features(model.of_data([found[0] for found in held.captions[:count]])),
        pixel_features(pixels),
        torch.arange(count) + len(splits["train"].keys),
        identity_groups(pixels),
    )
    return found.reciprocal_rank_score


def evaluate(
    config: RunConfig,
    inputs: StageInputs,
    models: Mapping[str, Path],
    report: Callable[[str], None] = lambda row: None,
) -> Evaluation:
    """Score models on the test split, each caption once, with baselines beside them.

    Args:
        config: of the run.
        inputs: data, teacher and captions.
        models: name -> model folder.
        report: called with the name of each row when it is scored.

    Raises:
        ValueError: the test split is empty.
    """
    dataset = open_dataset(inputs.data)
    splits = {name: load_split(dataset, name) for name in SPLITS if dataset.samples(name)}
    if "test" not in splits:
        raise ValueError(
            f"{dataset.files.uri} has no test split to evaluate on; raise data.test_share"
        )
    test, train = splits["test"], splits["train"]
    count = min(config.evaluation.captions or len(test.keys), len(test.keys))
    gallery = Gallery(splits, open_teacher(inputs.teacher / TEACHER))
    truth = torch.arange(count) + gallery.first["test"]
    captions = tuple(found[0] for found in test.captions[:count])
    images = {"real": test.pixels[:count]}
    for name, folder in models.items():
        images[name] = open_synthesizer(folder).of_data(captions)
    encoder = open_encoder(inputs.captions / ENCODER)
    images["untrained weights"] = synthesizer_of(config, encoder, None).of_data(captions)
    real = gallery.spaces["teacher"][truth]
    scores = {}
    for name, pixels in images.items():
        scores[name] = gallery.scores(pixels, truth)
        mean, deviation = kernel_distance(
            real,
            gallery.features("teacher", pixels),
            subsets=config.evaluation.subsets,
            subset_size=config.evaluation.subset_size,
        )
        scores[name] |= {"kernel_distance": mean, "kernel_distance_std": deviation}
        report(name)
    for name, pixels in _baselines(images["real"], test.labels[:count], train).items():
        scores[name] = gallery.scores(pixels, truth)
        report(name)
    return Evaluation(scores=scores, captions=captions, images=images)


def _baselines(
    real: Tensor, labels: tuple[dict[str, str], ...], train: SplitArrays
) -> dict[str, Tensor]:
    """Pictures that need no model: (N, 3, H, W) uint8 a row."""
    found = {f"true image blurred by {side} px": blurred(real, side) for side in (5, 9)}
    nearest = nearest_by_tone(labels, train.labels)
    if nearest is not None:
        found["nearest-tone training image"] = train.pixels[nearest[:, 0]]
        mean = train.pixels[nearest].float().mean(1).round()
        found["mean of the two nearest-tone training images"] = mean.to(torch.uint8)
    return found


def probe_embedding(data: DataSet | Files | Path, captions: Path) -> dict[str, float]:
    """Accuracy of linear probes for tone and gender on captions that no training saw, 0..1.

    Returns:
        label name -> accuracy; empty where the data set has no such labels, or no validation split.
    """
    if not open_dataset(data).samples("validation"):
        return {}
    encoder = open_encoder(captions / ENCODER)
    train, held = load_split(data, "train"), load_split(data, "validation")
    vectors = {
        id(split): encoder.encode([found[0] for found in split.captions]) for split in (train, held)
    }
    accuracy = {}
    for label in ("tone", "gender"):
        known = {found[label] for found in train.labels if label in found}
        rows = [i for i, found in enumerate(held.labels) if found.get(label) in known]
        if len(known) > 1 and rows and all(label in found for found in train.labels):
            accuracy[label] = probe_accuracy(
                vectors[id(train)],
                [found[label] for found in train.labels],
                vectors[id(held)][rows],
                [held.labels[i][label] for i in rows],
            )
    return accuracy

"""Scores of models on held-out captions, beside what would be scored without them.

Images are drawn, turned into features and forgotten block by block: memory does not grow with them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdn.baselines import nearest_by_tone
from sdn.captions import open_encoder
from sdn.data.dataset import open_dataset
from sdn.data.loader import load_split, split_blocks
from sdn.data.records import SPLITS
from sdn.features.rows import Rows, RowWriter
from sdn.judge import open_judge
from sdn.metrics import blurred, pixel_features, probe_accuracy
from sdn.reference import JUDGE, about_network, open_reference
from sdn.sampling import ENCODER, Synthesizer
from sdn.scores.diversity import apart, diversity
from sdn.scores.inception import InceptionScore
from sdn.scores.matching import found_captions, mismatched, r_precision
from sdn.scores.retrieval import retrieval_scores, true_image_ranks
from sdn.scores.sets import SetScores, score_sets
from sdn.stage_run import new_student

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from sdn.captions import CharCnnRnn, SentenceEncoder
    from sdn.config import EvaluationConfig, RunConfig
    from sdn.data.dataset import DataSet
    from sdn.data.files import Files
    from sdn.draws import Draws
    from sdn.features.networks import FeatureNetwork
    from sdn.judge import Judge
    from sdn.reference import Reference

UNTRAINED, REAL = "untrained weights", "real images"
REAL_APART, NOISE_APART = "diversity, real", "diversity, one caption"
"""Columns of `class_table`: distance of two real images of a class, of two images of a caption."""
_BATCH = 64
_GALLERY = 100_000
"""Images among which the true one is looked for: all test images, others up to this many."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One set of images: its scores, its rows, and each caption's part in them."""

    scores: SetScores
    features: Rows
    found: Tensor | None
    """(N,) float32, 1 where the judge found the own caption; None where too few others."""
    ranks: dict[str, Tensor]
    """`pixels` and `features` -> (N,) int64 rank of the true image."""


class Evaluator:
    """Scores sets of images that were drawn for the same captions.

    Args:
        dataset: whose test split is drawn.
        draws: the captions.
        network: in whose features sets are compared.
        reference: of the same data set and network.
        judge: of the same network.
        folder: for features; those of a set are kept there under the set's name.
    """

    def __init__(
        self,
        dataset: DataSet,
        draws: Draws,
        network: FeatureNetwork,
        reference: Reference,
        judge: Judge,
        folder: Path,
        splits: int = 10,
    ) -> None:
        self.dataset, self.draws, self.network = dataset, draws, network
        self.reference, self.judge, self.folder, self.splits = reference, judge, folder, splits
        self.independent = draws.independent()
        self._gallery()
        # Captions of the test split first; of others only where those are too few.
        self.others = list(dict.fromkeys(draws.captions))
        images = self.truth.tolist()
        self.chosen = mismatched(draws.captions, self.others, draws.seed, images)
        if self.chosen is None:
            self.others += [c[0] for s in ("validation", "train") for c in self._captions(s)]
            self.chosen = mismatched(draws.captions, self.others, draws.seed, images)

    def _captions(self, split: str) -> Iterator[tuple[str, ...]]:
        for block in split_blocks(self.dataset, split, most=1000):
            yield from block.captions

    def _gallery(self) -> None:
        """All images in both spaces on disk; which of them are the first of their like."""
        seen: dict[bytes, int] = {}
        first, same, total = [], [], 0
        features = RowWriter(self.folder / ".gallery-features")
        with RowWriter(self.folder / ".gallery-pixels") as pixels, features:
            for split in reversed(SPLITS):  # the test split first: its rows are the draws' truth
                held = self.reference.about["images"].get(split, 0)
                whole = self.dataset.samples(split)
                most = whole if split == "test" else max(0, min(_GALLERY - total, held))
                rows = self.reference.rows(split) if held else None
                start = 0
                for block in split_blocks(self.dataset, split, size=_BATCH, most=most):
                    pixels.write(pixel_features(block.pixels))
                    stop = start + len(block.keys)
                    known = rows is not None and stop <= held
                    features.write(
                        rows.read(start, stop) if known else self.network(block.pixels)[0]  # type: ignore[union-attr]
                    )
                    for image in block.pixels:
                        digest = hashlib.sha256(image.contiguous().numpy().tobytes()).digest()
                        same.append(seen.setdefault(digest, total))
                        first.append(same[-1] == total)
                        total += 1
                    start = stop
        self.spaces = {"pixels": pixels.rows(), "features": features.rows()}
        self.first = torch.tensor(first)
        self.same = torch.tensor(same)

    @property
    def truth(self) -> Tensor:
        """(N,) int64 row of each draw's true image in the gallery."""
        return self.same[torch.tensor(self.draws.truth)]

    def score(
        self, name: str, blocks: Iterator[Tensor], report: Callable[[int], None] = lambda n: None
    ) -> Drawn:
        """Scores of a set of images, one for each draw in their order.

        Args:
            name: of the set; its features are kept in the file `features-NAME.f32`.
            blocks: (B, 3, H, W) uint8 pixels.
            report: called with the number of images done.
        """
        count = len(self.draws)
        inception = InceptionScore(count, self.network.classes, self.splits)
        done = 0
        features = RowWriter(feature_file(self.folder, name))
        with RowWriter(self.folder / ".pixels") as pixels, features:
            for block in blocks:
                vectors, logits = self.network(block)
                features.write(vectors)
                pixels.write(pixel_features(block))
                inception.update(logits)
                done += len(block)
                report(done)
        rows = features.rows()
        queries = {"pixels": pixels.rows(), "features": rows}
        ranks = {
            space: true_image_ranks(queries[space], self.spaces[space], self.truth, self.first)
            for space in queries
        }
        found = self.captions_found(rows)
        scores: SetScores = {}
        if found is not None:
            scores["r_precision_score"] = r_precision(found, len(self.independent)).as_dict()
        else:
            why = "caption match needs 100 different captions, the data set has fewer"
            scores["r_precision_score"] = {"withheld": why, "count": count}
        if name == REAL:  # at no distance from themselves
            scores["diversity_score"] = diversity(rows.pick(self.independent)).as_dict()
        else:
            single = rows.pick(self.independent)
            scores |= score_sets(self.reference.rows("test"), rows, single)
        scores["inception_score"] = inception.score().as_dict()
        for space, of_space in ranks.items():
            for score, value in retrieval_scores(of_space, len(self.independent)).items():
                scores[f"{space}/{score}"] = value.as_dict()
        return Drawn(scores=scores, features=rows, found=found, ranks=ranks)

    def noise_apart(self, drawn: Drawn, again: Iterator[Tensor]) -> Tensor:
        """How far noise alone moves an image.

        Args:
            drawn: the set of a model.
            again: (B, 3, H, W) uint8, its images of the independent draws with other noise.

        Returns:
            (N,) float64 distance of the two images of each independent draw, in the features.
        """
        with RowWriter(self.folder / ".features-again") as writer:
            for block in again:
                writer.write(self.network(block)[0])
        return apart(drawn.features.pick(self.independent), writer.rows())

    def captions_found(self, rows: Rows) -> Tensor | None:
        """See `Drawn.found`."""
        if self.chosen is None:
            return None
        return found_captions(self.judge, rows, self.draws.captions, self.others, self.chosen)

    def real(self) -> Iterator[Tensor]:
        """The draws' true images, in their order."""
        truth = self.draws.truth
        position, start = 0, 0
        for block in split_blocks(self.dataset, "test", size=_BATCH):
            stop, chosen = start + len(block.keys), []
            while position < len(truth) and truth[position] < stop:
                chosen.append(truth[position] - start)
                position += 1
            # An image of many draws comes as often; never more of them at a time than are drawn.
            yield from torch.split(block.pixels[chosen], _BATCH) if chosen else ()
            start = stop

    def close(self) -> None:
        """Delete what no later stage reads."""
        for name in (".gallery-features", ".gallery-pixels", ".pixels", ".features-again"):
            (self.folder / name).unlink(missing_ok=True)


def feature_file(folder: Path, name: str) -> Path:
    """Where the features of a set are kept."""
    return folder / f"features-{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.f32"


def open_evaluator(
    config: EvaluationConfig,
    dataset: DataSet,
    draws: Draws,
    network: FeatureNetwork,
    places: Mapping[str, Path],
    folder: Path,
) -> Evaluator:
    """An evaluator from the folders of earlier stages.

    Args:
        config: of the evaluation.
        dataset: whose test split is drawn.
        draws: the captions.
        network: the feature network.
        places: `reference` and `judge`, folders.
        folder: for features.

    Raises:
        ValueError: the reference is of another feature network.
    """
    reference = open_reference(places["reference"])
    if reference.about["features"] != about_network(network):
        raise ValueError(
            f"the reference in {places['reference']} is of {reference.about['features']}, not of "
            f"{about_network(network)}: delete its folder to make it anew"
        )
    judge = open_judge(places["judge"] / JUDGE)
    return Evaluator(dataset, draws, network, reference, judge, folder, config.splits)


def drawn_blocks(model: Synthesizer, draws: Draws) -> Iterator[Tensor]:
    """(B, 3, H, W) uint8 pixels of the draws, block by block."""
    for start in range(0, len(draws), _BATCH):
        yield model.of_data(draws.captions[start : start + _BATCH], seed=draws.seed)


def blocks_again(model: Synthesizer, draws: Draws) -> Iterator[Tensor]:
    """As `drawn_blocks`, of the independent draws alone and with other noise."""
    captions = [draws.captions[n] for n in draws.independent()]
    for start in range(0, len(captions), _BATCH):
        yield model.of_data(captions[start : start + _BATCH], seed=draws.seed + 1)


def pictures(model: Synthesizer, draws: Draws, numbers: list[int]) -> Tensor:
    """(N, 3, H, W) uint8 pixels of the draws of these numbers."""
    return model.of_data([draws.captions[n] for n in numbers], seed=draws.seed)


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
        noise_scale=config.student.noise_scale,
    )


def baseline_scores(evaluator: Evaluator, draws: Draws) -> dict[str, SetScores]:
    """Retrieval of pictures that need no model: the true image blurred, and siblings' images."""
    found = {}
    for side in (5, 9):
        blocks = (blurred(block, side) for block in evaluator.real())
        found[f"true image blurred by {side} px"] = _retrieval_of(evaluator, blocks)
    labels = [draws.labels[row] for row in draws.truth]
    if not any("tone" in label for label in labels):
        return found
    train = load_split(evaluator.dataset, "train")
    nearest = nearest_by_tone(labels, train.labels)
    if nearest is not None:
        mean = (
            train.pixels[rows].float().mean(1).round().to(torch.uint8)
            for rows in torch.split(nearest, _BATCH)
        )
        one = (train.pixels[rows[:, 0]] for rows in torch.split(nearest, _BATCH))
        found["nearest-tone training image"] = _retrieval_of(evaluator, one)
        found["mean of the two nearest-tone training images"] = _retrieval_of(evaluator, mean)
    return found


def _retrieval_of(evaluator: Evaluator, blocks: Iterator[Tensor]) -> SetScores:
    with RowWriter(evaluator.folder / ".pixels") as pixels:
        for block in blocks:
            pixels.write(pixel_features(block))
    gallery = evaluator.spaces["pixels"]
    ranks = true_image_ranks(pixels.rows(), gallery, evaluator.truth, evaluator.first)
    return {f"pixels/{k}": v.as_dict() for k, v in retrieval_scores(ranks).items()}


def class_table(
    draws: Draws,
    drawn: Drawn,
    real: Rows | None = None,
    moved: Tensor | None = None,
    most: int = 200,
) -> dict[str, list[dict[str, Any]]]:
    """Label name -> a row a class with its count and mean scores, for labels of few classes.

    Args:
        draws: the draws.
        drawn: the set of a model.
        real: features of the draws' true images, for how far those of a class lie apart.
        moved: how far noise alone moves the model's images, see `Evaluator.noise_apart`.
        most: classes of a label.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    independent = draws.independent()
    position = {number: place for place, number in enumerate(independent)}
    names = {name for row in draws.truth for name in draws.labels[row]}
    for name in sorted(names):
        classes: dict[str, list[int]] = {}
        for number, row in enumerate(draws.truth):
            classes.setdefault(draws.labels[row].get(name, ""), []).append(number)
        if 1 < len(classes) <= most:
            tables[name] = []
            for kind, numbers in sorted(classes.items(), key=lambda item: -len(item[1])):
                line: dict[str, Any] = {
                    "class": kind,
                    "images": len(numbers),
                    "caption match": None if drawn.found is None else _mean(drawn.found, numbers),
                    "top 1": _mean(drawn.ranks["pixels"] == 1, numbers),
                    "top 5": _mean(drawn.ranks["pixels"] <= 5, numbers),
                }
                single = [number for number in numbers if number in position]
                if real is not None:
                    line[REAL_APART] = diversity(real.pick(single)).value
                if moved is not None:
                    of_class = [position[number] for number in single]
                    line[NOISE_APART] = _mean(moved, of_class)
                tables[name].append(line)
    return tables


def _mean(values: Tensor, numbers: list[int]) -> float:
    return float(values[numbers].double().mean())


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

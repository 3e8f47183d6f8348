"""Real images in the feature network, once for a data set: what scores are held against."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdn.data.dataset import open_dataset
from sdn.data.loader import split_blocks
from sdn.data.records import SPLITS
from sdn.features.rows import Rows, RowWriter
from sdn.judge import fit_judge, save_judge
from sdn.scores.sets import SetScores, score_sets

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdn.config import EvaluationConfig, JudgeConfig
    from sdn.data.dataset import DataSet
    from sdn.data.files import Files
    from sdn.features.networks import FeatureNetwork

REFERENCE, JUDGE = "reference.json", "judge.safetensors"
HALVES, TRAIN = "real: halves of the test split", "real: training against test"
"""Names of the floors."""
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What `write_reference` left in a folder."""

    folder: Path
    about: dict[str, Any]
    """What the features are of, see `write_reference`."""

    def rows(self, split: str) -> Rows:
        """(N, F) features of the first images of a split, in the order of the manifest."""
        return Rows(self.folder / f"{split}.f32", self.about["features"]["dim"])


def about_network(network: FeatureNetwork) -> dict[str, Any]:
    """What a score says of the network that its features are from."""
    return {
        "network": network.name,
        "sha256": network.digest,
        "input_px": network.size or "as the image",
        "resize": network.resize,
        "dim": network.dim,
    }


def write_reference(
    folder: Path,
    data: DataSet | Files | Path,
    network: FeatureNetwork,
    config: EvaluationConfig,
    report: Callable[[float, str], None] = lambda share, text: None,
) -> dict[str, Any]:
    """Write the features of a data set's real images, a file a split, and score real against real.

    Args:
        folder: to write into.
        data: the data set.
        network: whose features.
        config: `real_images` a split at most.
        report: called with (share done, text).

    Returns:
        `features` (see `about_network`), `image_px`, `images` (split -> count), `digest` of the
        test split's features, and `floors`: row -> score name -> score.
    """
    dataset = open_dataset(data)
    counts = {s: min(config.real_images, dataset.samples(s)) for s in SPLITS if dataset.samples(s)}
    done, digests, rows = 0, {}, {}
    for split, count in counts.items():
        sha = hashlib.sha256()
        with RowWriter(folder / f"{split}.f32") as writer:
            for block in split_blocks(dataset, split, size=_BATCH, most=count):
                features, _ = network(block.pixels)
                writer.write(features)
                sha.update(features.numpy().tobytes())
                done += len(block.keys)
                report(done / sum(counts.values()), f"{done:,} of {sum(counts.values()):,} images")
            rows[split] = writer.rows()
        digests[split] = sha.hexdigest()
    about = {
        "features": about_network(network),
        "image_px": dataset.manifest.resolution,
        "images": counts,
        "digest": digests.get("test", ""),
        "floors": _floors(rows),
    }
    (folder / REFERENCE).write_text(json.dumps(about, indent=2))
    return about


def open_reference(folder: Path) -> Reference:
    """The reference in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / REFERENCE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no reference: {REFERENCE} is missing")
    return Reference(folder=folder, about=json.loads(path.read_text()))


def _floors(rows: dict[str, Rows]) -> dict[str, SetScores]:
    """Real against real: as good as a model can be with so many images."""
    if "test" not in rows:
        return {}
    test = rows["test"]
    half = len(test) // 2
    floors = {HALVES: score_sets(test.part(0, half), test.part(half, len(test)))}
    if "train" in rows:
        floors[TRAIN] = score_sets(test, rows["train"])
    return floors


def write_judge(
    folder: Path,
    data: DataSet | Files | Path,
    reference: Reference,
    config: JudgeConfig,
    report: Callable[[float, str], None] = lambda share, text: None,
) -> dict[str, Any]:
    """Fit the judge on the training split's reference and write it.

    Returns:
        `held_out_score`: see `sdn.judge.fit_judge`; null without validation images.

    Raises:
        ValueError: fewer than two training images.
    """
    captions, features = {}, {}
    for split in ("train", "validation"):
        count = reference.about["images"].get(split, 0)
        found: list[tuple[str, ...]] = []
        for block in split_blocks(data, split, most=count) if count else ():
            found += block.captions
        captions[split] = found
        features[split] = reference.rows(split).read(0, count) if count else None
    train = features["train"]
    if train is None:
        raise ValueError("the judge needs training images, the data set has none")
    held = features["validation"]
    judge, score = fit_judge(
        captions["train"],
        train,
        captions["validation"],
        train[:0] if held is None else held,
        config,
        report,
    )
    save_judge(judge, folder / JUDGE)
    return {"held_out_score": None if math.isnan(score) else score, "images": len(train)}

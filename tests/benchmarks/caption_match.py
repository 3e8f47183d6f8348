"""What caption match and KID punish: real images spoilt a little, copies, and a model's own.

    python tests/benchmarks/caption_match.py --store RUNS [--model models:/NAME/N]

Each set is scored on all test captions, by the judge and the feature network of the model's own
evaluation. *Copied* is, for each test caption, the training image whose caption lies nearest in
the embedding that the student reads: what a model could reach that draws no better and no worse
than a photographer, and knows no more of a caption than its encoder tells it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pipelines.evaluating import network_of
from pipelines.preparing import data_set
from pipelines.scoring import open_scoring, score
from sdn.data.loader import load_split
from sdn.draws import plan_draws
from sdn.evaluation import drawn_blocks, open_evaluator
from sdn.metrics import blurred
from sdn.sampling import open_synthesizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from pipelines.scoring import Scored
    from sdn.captions import CharCnnRnn, SentenceEncoder
    from sdn.draws import Draws
    from sdn.evaluation import Evaluator

NEAR_WHITE = 235
"""From here on all three colours pass for white."""


def noisy(pixels: Tensor, deviation: float) -> Tensor:
    """With independent normal noise on each value, 0..255."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(pixels.shape, generator=generator) * deviation
    return (pixels + noise).round().clamp(0, 255).to(torch.uint8)


def darker(pixels: Tensor, factor: float) -> Tensor:
    return (pixels * factor).round().to(torch.uint8)


def whitened(pixels: Tensor) -> Tensor:
    """With what is nearly white made white."""
    white = pixels.amin(1, keepdim=True) > NEAR_WHITE
    return pixels.masked_fill(white, 255)


def nearest(
    encoder: CharCnnRnn | SentenceEncoder, captions: list[str], others: list[str]
) -> Tensor:
    """(N,) int64: the row of the other whose embedding has the greatest cosine."""
    own, known = (
        functional.normalize(
            torch.cat([encoder.encode(texts[i : i + 256]) for i in range(0, len(texts), 256)]),
            dim=1,
        )
        for texts in (captions, others)
    )
    return torch.cat([(part @ known.T).argmax(1) for part in torch.split(own, 256)])


def sets(
    scored: Scored, draws: Draws, evaluator: Evaluator
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Name -> (B, 3, H, W) uint8, block by block, an image a test caption."""
    model = open_synthesizer(scored.scoring.found.folder)
    yield "true images", evaluator.real()
    yield "true, 4% darker", (darker(x, 0.96) for x in evaluator.real())
    yield "true, noise of 2 in 255", (noisy(x, 2) for x in evaluator.real())
    yield "true, noise of 4 in 255", (noisy(x, 4) for x in evaluator.real())
    yield "true, blurred by 3 px", (blurred(x, 3) for x in evaluator.real())
    train = load_split(evaluator.dataset, "train")
    rows = nearest(model.encoder, [*draws.captions], [found[0] for found in train.captions])
    yield "copied", (train.pixels[part] for part in torch.split(rows, 64))
    yield "drawn", drawn_blocks(model, draws)
    yield "drawn, near white made white", (whitened(x) for x in drawn_blocks(model, draws))
    yield "drawn, blurred by 3 px", (blurred(x, 3) for x in drawn_blocks(model, draws))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--model", help="its champion where none is named")
    given = parser.parse_args()
    scored = score(open_scoring(given.model, given.store, {}))
    run, inputs = scored.scoring.run, scored.inputs
    dataset = data_set(run, inputs["data"])
    draws = plan_draws(dataset, run.config.evaluation)
    places = {role: run.store.fetch(inputs[role].folder) for role in ("reference", "judge")}
    network = network_of(run, inputs["teacher"])
    with tempfile.TemporaryDirectory() as folder:
        evaluator = open_evaluator(
            run.config.evaluation, dataset, draws, network, places, Path(folder)
        )
        print(f"{'':30} {'caption match':>14} {'KID':>8} {'precision':>10}")
        for name, blocks in sets(scored, draws, evaluator):
            found = evaluator.score(name, blocks).scores
            match, kid, precision = (
                found[key]["value"] for key in ("r_precision_score", "kid_error", "precision_score")
            )
            print(f"{name:30} {match:14.1%} {kid:8.4f} {precision:10.2f}", flush=True)


if __name__ == "__main__":
    main()

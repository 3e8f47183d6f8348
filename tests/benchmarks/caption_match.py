"""What caption match and KID punish: real images spoilt a little, copies, and a model's own.

    python tests/benchmarks/caption_match.py --store RUNS [--model models:/NAME/N] [--captions N]

Each set is scored on all test captions, or on N of them, by the judge and the feature network of
the model's own evaluation, which the store of its run holds. *Copied* is, for each test caption,
the training image one of whose captions lies nearest in the embedding that the student reads: what
a model could reach that draws as well as a photographer and knows of a caption what its encoder
tells it. KID and precision of true images, spoilt or not, are against those same images: KID
understates, precision overstates. *Fine chroma* is what subsampling by 4 would take away, root of
the mean square, 0..255.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pipelines import evaluating
from pipelines.evaluating import network_of
from pipelines.preparing import data_set
from pipelines.run import perform
from pipelines.scoring import inputs_of, open_scoring
from sdn.chroma import subsampled
from sdn.data.loader import load_split
from sdn.draws import plan_draws
from sdn.evaluation import drawn_blocks, open_evaluator
from sdn.metrics import blurred
from sdn.sampling import open_synthesizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from pipelines.scoring import Scoring
    from sdn.captions import CharCnnRnn, SentenceEncoder
    from sdn.evaluation import Evaluator
    from sdn.scores.sets import SetScores

NEAR_WHITE = 236
"""From here on all three colours pass for white."""
CHROMA = 4
"""Times coarser than brightness that the chroma of some sets is made."""
SCORES = ("r_precision_score", "kid_error", "precision_score")


def noisy(deviation: float) -> Callable[[Tensor], Tensor]:
    """Adds independent normal noise to each value, 0..255."""
    generator = torch.Generator().manual_seed(0)

    def change(pixels: Tensor) -> Tensor:
        noise = torch.randn(pixels.shape, generator=generator) * deviation
        return (pixels + noise).round().clamp(0, 255).to(torch.uint8)

    return change


def darker(pixels: Tensor) -> Tensor:
    """By 4%."""
    return (pixels * 0.96).round().to(torch.uint8)


def whitened(pixels: Tensor) -> Tensor:
    """With what is nearly white made white."""
    white = pixels.amin(1, keepdim=True) >= NEAR_WHITE
    return pixels.masked_fill(white, 255)


def softened(pixels: Tensor) -> Tensor:
    """Blurred over three pixels."""
    return blurred(pixels, 3)


def coarse(pixels: Tensor) -> Tensor:
    """With chroma `CHROMA` times coarser."""
    return subsampled(pixels.float(), CHROMA).round().clamp(0, 255).to(torch.uint8)


class FineChroma:
    """What a set of images has of it, as they go by."""

    def __init__(self) -> None:
        self._squares: list[Tensor] = []

    def __call__(self, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        for block in blocks:
            fine = block - subsampled(block.float(), CHROMA)
            self._squares.append(fine.square().mean((1, 2, 3)))
            yield block

    def value(self) -> float:
        """Root of the mean square, 0..255."""
        return float(torch.cat(self._squares).mean().sqrt())


def embedded(encoder: CharCnnRnn | SentenceEncoder, captions: list[str]) -> Tensor:
    """(N, D), rows of unit length."""
    blocks = [encoder.encode(captions[i : i + 256]) for i in range(0, len(captions), 256)]
    return functional.normalize(torch.cat(blocks), dim=1)


def nearest(own: Tensor, known: Tensor) -> Tensor:
    """(N,) int64: the row of `known` with the greatest cosine; of equal ones any."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for part in torch.split(own, 256):
        cosines = part @ known.T
        found.append((cosines + 1e-6 * torch.rand(cosines.shape, generator=generator)).argmax(1))
    return torch.cat(found)


def copied(evaluator: Evaluator, encoder: CharCnnRnn | SentenceEncoder) -> Iterator[Tensor]:
    """(B, 3, H, W) uint8: for each test caption the training image of the nearest one."""
    train = load_split(evaluator.dataset, "train")
    image_of = [row for row, found in enumerate(train.captions) for _ in found]
    captions = [caption for found in train.captions for caption in found]
    own = embedded(encoder, [*evaluator.draws.captions])
    rows = torch.tensor(image_of)[nearest(own, embedded(encoder, captions))]
    print(f"copied: {len({*rows.tolist()}):,} different images of {len(train.captions):,}")
    for part in torch.split(rows, 64):
        yield train.pixels[part]


def line(name: str, scores: SetScores, fine: float) -> str:
    """A row of the table."""
    match, kid, precision = (scores[key].get("value") for key in SCORES)
    return (
        f"{name:30} {'-' if match is None else f'{match:.1%}':>14} "
        f"{'-' if kid is None else f'{kid:.4f}':>8} "
        f"{'-' if precision is None else f'{precision:.2f}':>10} {fine:12.2f}"
    )


def evaluator_of(scoring: Scoring, folder: Path) -> Evaluator:
    """The evaluator of a model's own evaluation, with what it scores kept in `folder`."""
    run = scoring.run
    inputs = inputs_of(run, scoring.found)
    data, taught = inputs["data"], inputs["teacher"]
    real = perform(run, evaluating.reference(run, data, taught))
    judge = perform(run, evaluating.judge(run, data, real))
    places = {"reference": run.store.fetch(real.folder), "judge": run.store.fetch(judge.folder)}
    config, dataset = run.config.evaluation, data_set(run, data)
    draws, network = plan_draws(dataset, config), network_of(run, taught)
    return open_evaluator(config, dataset, draws, network, places, folder)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="folder or s3:// of the model's run")
    parser.add_argument("--model", help="its champion where none is named")
    parser.add_argument("--captions", type=int, help="how many; all where not given")
    given = parser.parse_args()
    fewer = {} if given.captions is None else {"evaluation.captions": str(given.captions)}
    scoring = open_scoring(given.model, given.store, fewer)
    model = open_synthesizer(scoring.found.folder)
    with tempfile.TemporaryDirectory() as folder:
        evaluator = evaluator_of(scoring, Path(folder))
        drawn = [*drawn_blocks(model, evaluator.draws)]
        sets = {
            "true images": evaluator.real(),
            "true, 4% darker": map(darker, evaluator.real()),
            "true, noise of 2 in 255": map(noisy(2), evaluator.real()),
            "true, noise of 4 in 255": map(noisy(4), evaluator.real()),
            "true, blurred by 3 px": map(softened, evaluator.real()),
            "true, chroma 4 times coarser": map(coarse, evaluator.real()),
            "copied": copied(evaluator, model.encoder),
            "drawn": iter(drawn),
            "drawn, near white made white": map(whitened, drawn),
            "drawn, blurred by 3 px": map(softened, drawn),
            "drawn, chroma 4 times coarser": map(coarse, drawn),
        }
        print(f"{'':30} {'caption match':>14} {'KID':>8} {'precision':>10} {'fine chroma':>12}")
        for name, blocks in sets.items():
            fine = FineChroma()
            scores = evaluator.score(name, fine(blocks)).scores
            print(line(name, scores, fine.value()), flush=True)


if __name__ == "__main__":
    main()

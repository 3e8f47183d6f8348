"""What a finished model gives when its noise goes less or more far: nothing is trained.

    python tests/benchmarks/noise_scale.py --store RUNS [--model models:/NAME/N] [--captions N]
        [--scales 0.4,1,1.5]

Each scale is scored on all test captions, or on N of them, as the model's own evaluation scores it,
whose judge and reference the store of its run holds. The columns: FID, KID, caption match,
precision and recall, how far two images of one caption lie apart; below each line, for each label
of the data, in how many classes that is at least half of what lies between two real images.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from caption_match import evaluator_of

from pipelines.report import spread
from pipelines.scoring import open_scoring
from sdn.config.networks import MOST_NOISE
from sdn.evaluation import REAL, blocks_again, class_table, drawn_blocks
from sdn.sampling import open_synthesizer

if TYPE_CHECKING:
    from collections.abc import Mapping

SCORES = ("fid_error", "kid_error", "r_precision_score", "precision_score", "recall_score")


def told(scores: Mapping[str, Mapping[str, float | None]]) -> str:
    """The scores with their intervals, in the order of `SCORES`."""
    cells = []
    for key in SCORES:
        value, low, high = (scores[key].get(name) for name in ("value", "low", "high"))
        cell = "-" if value is None else f"{value:.4g}"
        cells.append(cell if low is None or high is None else f"{cell} ({low:.4g} to {high:.4g})")
    return "  ".join(f"{cell:>26}" for cell in cells)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="folder or s3:// of the model's run")
    parser.add_argument("--model", help="its champion where none is named")
    parser.add_argument("--captions", type=int, help="how many; all where not given")
    parser.add_argument("--scales", default="0,0.4,0.7,1,1.5", help="factors on the noise")
    given = parser.parse_args()
    fewer = {} if given.captions is None else {"evaluation.captions": str(given.captions)}
    scoring = open_scoring(given.model, given.store, fewer)
    model = open_synthesizer(scoring.found.folder)
    if not model.noise:
        parser.error(f"{scoring.found.title} has no noise: its images are the same at any scale")
    scales = [float(scale) for scale in given.scales.split(",")]
    if wrong := [scale for scale in scales if not 0 <= scale <= MOST_NOISE]:
        parser.error(f"--scales must be 0 to {MOST_NOISE:g}, not {wrong[0]:g}")
    with tempfile.TemporaryDirectory() as folder:
        evaluator = evaluator_of(scoring, Path(folder))
        draws = evaluator.draws
        real = evaluator.score(REAL, evaluator.real()).features
        print(f"{'noise times':>11}  {'  '.join(f'{name:>26}' for name in SCORES)}  apart")
        for scale in scales:
            scaled = dataclasses.replace(model, noise_scale=scale)
            drawn = evaluator.score(f"{scale:g}", drawn_blocks(scaled, draws))
            moved = evaluator.noise_apart(drawn, blocks_again(scaled, draws))
            print(f"{scale:11g}  {told(drawn.scores)}  {moved.mean():.3g}", flush=True)
            for label, lines in class_table(draws, drawn, real, moved).items():
                if (wide := spread(lines)) is not None:
                    print(f"{'':13}{label}: {wide}", flush=True)


if __name__ == "__main__":
    main()

"""Which captions an evaluation draws: the protocols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdn.data.loader import split_blocks

if TYPE_CHECKING:
    from sdn.config import EvaluationConfig
    from sdn.data.dataset import DataSet

GAN_DRAWS = 30_000
"""Images of the GAN papers' protocol, where there are so many captions."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What is drawn, in the order of the test split."""

    captions: tuple[str, ...]
    """One an image to draw."""
    truth: tuple[int, ...]
    """For each the row of its true image in the test split; rises."""
    keys: tuple[str, ...]
    """Key of each row of the test split."""
    labels: tuple[dict[str, str], ...]
    """Labels of each row."""
    seed: int

    def __len__(self) -> int:
        """Images to draw."""
        return len(self.captions)

    def independent(self) -> list[int]:
        """Numbers of the first draw of each true image."""
        first = {row: number for number, row in reversed(list(enumerate(self.truth)))}
        return sorted(first.values())

    def spread(self, count: int) -> list[int]:
        """Numbers of `count` draws (or all) spread evenly, so that no one class fills a sheet."""
        count = min(count, len(self))
        return [i * len(self) // count for i in range(count)]


def plan_draws(dataset: DataSet, config: EvaluationConfig) -> Draws:
    """The draws of the configured protocol on a data set's test split.

    Raises:
        ValueError: the test split is empty.
    """
    if not dataset.samples("test"):
        raise ValueError(
            f"{dataset.files.uri} has no test split to evaluate on; raise data.test_share"
        )
    captions: list[tuple[str, ...]] = []
    keys: list[str] = []
    labels: list[dict[str, str]] = []
    for block in split_blocks(dataset, "test"):
        captions += block.captions
        keys += block.keys
        labels += block.labels
    pairs = _pairs([len(found) for found in captions], config)
    return Draws(
        captions=tuple(captions[row][number] for row, number in pairs),
        truth=tuple(row for row, _ in pairs),
        keys=tuple(keys),
        labels=tuple(labels),
        seed=config.seed,
    )


def _pairs(counts: list[int], config: EvaluationConfig) -> list[tuple[int, int]]:
    """(row, number of its caption) of each draw, given how many captions each row has."""
    every = [(row, number) for row, count in enumerate(counts) for number in range(count)]
    generator = np.random.default_rng(config.seed)
    if config.protocol == "each-image":
        return [(row, 0) for row in range(len(counts))][: config.captions]
    if config.protocol == "authors":
        if config.captions is None or config.captions >= len(every):
            return every
        kept = generator.choice(len(every), config.captions, replace=False)
        return [every[i] for i in np.sort(kept)]
    # Not with replacement: without noise a caption drawn twice is one image twice.
    count = min(config.captions or GAN_DRAWS, len(every))
    return [every[i] for i in np.sort(generator.choice(len(every), count, replace=False))]

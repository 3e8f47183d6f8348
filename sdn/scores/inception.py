"""Inception Score: images that a classifier is sure of, and that are not all of one class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdn.scores.score import Score

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 5_000
"""Images below which the score depends more on their number than on the images."""


class InceptionScore:
    """Counts up the score of a stream of classifications; what it keeps does not grow with it.

    Formula: exp(mean over images of KL(p(class | image) || p(class))), in each of the splits.
    Source: Salimans et al. 2016, arXiv:1606.03498. torchmetrics' keeps all logits in memory.
    """

    def __init__(self, count: int, classes: int, splits: int = 10) -> None:
        """Args:
        count: images to come; split k has those from k * count / splits on.
        classes: K; 0 where the feature network classifies nothing.
        splits: over which mean and deviation are taken.
        """
        self.count, self.classes, self.splits = count, classes, splits
        self._seen = 0
        self._sums = torch.zeros(splits, classes, dtype=torch.float64)
        self._entropies = torch.zeros(splits, dtype=torch.float64)
        self._counts = torch.zeros(splits, dtype=torch.float64)

    def update(self, logits: Tensor) -> None:
        """The next (B, K) of them."""
        if self.classes == 0:
            return
        p = logits.double().softmax(1)
        number = torch.arange(self._seen, self._seen + len(p)) * self.splits // self.count
        self._seen += len(p)
        self._sums.index_add_(0, number, p)
        self._entropies.index_add_(0, number, torch.special.entr(p).sum(1))
        self._counts.index_add_(0, number, torch.ones(len(p), dtype=torch.float64))

    def score(self) -> Score:
        """Mean over the splits, with Student's interval; the deviation is told in its text.

        At least 1, at most K; higher is better. Withheld below `LEAST` images.
        """
        if self.classes == 0:
            why = "the feature network has no classes"
            return Score(count=self.count, withheld=why)
        if self.count < LEAST:
            why = f"Inception Score needs at least {LEAST:,} images, there are {self.count:,}"
            return Score(count=self.count, withheld=why)
        from scipy.stats import t

        found = self.of_splits()
        mean, deviation = float(found.mean()), float(found.std())
        half = float(t.ppf(0.975, self.splits - 1)) * deviation / self.splits**0.5
        return Score(
            value=mean,
            low=mean - half,
            high=mean + half,
            interval=f"t over {self.splits} splits, whose deviation is {deviation:.3f}",
            count=self.count,
        )

    def of_splits(self) -> Tensor:
        """(splits,) float64, the score of each."""
        marginal = self._sums / self._counts.unsqueeze(1)
        mean_entropy = self._entropies / self._counts
        found: Tensor = (torch.special.entr(marginal).sum(1) - mean_entropy).exp()
        return found

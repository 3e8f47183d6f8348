"""Whether what came differs from what was there: words, lengths of captions, features of images."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LEAST = 10
"""Samples a side below which nothing is tested."""
PERMUTATIONS = 999
_WORD = re.compile(r"\w+")
_SHOWN = 20
_CHUNK = 256
"""Permutations whose sums are taken at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoSample:
    """A test of whether two sets of vectors are draws of one distribution."""

    value: float
    """Unbiased squared MMD with the kernel of KID; about 0 where they are."""
    p_value: float
    """How often a random division of all vectors into two such sets gives at least this value."""
    first: int
    second: int
    """Vectors of each set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WordDrift:
    """Words of new captions that no caption before had."""

    words: int
    """Words of the new captions, each as often as it comes."""
    unseen_words: int
    captions: int
    unseen_captions: int
    """Captions with at least one such word."""
    most: tuple[tuple[str, int], ...]
    """The most frequent ones, each with its count."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values, shares beside the counts."""
        return {
            "words": self.words,
            "unseen_words": self.unseen_words,
            "unseen_word_share": self.unseen_words / self.words if self.words else 0.0,
            "captions": self.captions,
            "unseen_captions": self.unseen_captions,
            "unseen_caption_share": self.unseen_captions / self.captions if self.captions else 0.0,
            "most": [list(pair) for pair in self.most],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthDrift:
    """Lengths of captions in characters, before and among the new ones."""

    median_before: float
    median: float
    value: float
    """Kolmogorov and Smirnov's distance of the two distributions, 0..1."""
    p_value: float
    first: int
    second: int
    """Captions of each side."""


def words_of(caption: str) -> list[str]:
    """The words of a caption in lower case."""
    return _WORD.findall(caption.lower())


def word_drift(vocabulary: set[str], captions: Iterable[str]) -> WordDrift:
    """How much of new captions is out of the sight of earlier ones.

    Args:
        vocabulary: all words of the earlier captions, in lower case.
        captions: the new ones.
    """
    unseen: Counter[str] = Counter()
    words = count = strange = 0
    for caption in captions:
        found = words_of(caption)
        new = [word for word in found if word not in vocabulary]
        unseen.update(new)
        words += len(found)
        count += 1
        strange += bool(new)
    # Of equally frequent ones the first in the alphabet: the same input is told in the same words.
    most = sorted(unseen.items(), key=lambda pair: (-pair[1], pair[0]))[:_SHOWN]
    return WordDrift(
        words=words,
        unseen_words=unseen.total(),
        captions=count,
        unseen_captions=strange,
        most=tuple(most),
    )


def length_drift(before: Sequence[int], lengths: Sequence[int]) -> LengthDrift | None:
    """Whether captions became longer or shorter; None below `LEAST` a side.

    Args:
        before, lengths: characters of each caption, the earlier ones and the new ones.
    """
    from scipy import stats

    if min(len(before), len(lengths)) < LEAST:
        return None
    found = stats.ks_2samp(before, lengths)
    return LengthDrift(
        median_before=float(np.median(before)),
        median=float(np.median(lengths)),
        value=float(found.statistic),
        p_value=float(found.pvalue),
        first=len(before),
        second=len(lengths),
    )


def two_sample_test(
    first: Tensor, second: Tensor, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> TwoSample | None:
    """Whether two sets of feature vectors are draws of one distribution; None below `LEAST` a side.

    Formula: the unbiased squared MMD of KID, k(a, b) = (<a, b> / F + 1)^3, held against its values
        for random divisions of the pooled vectors; p = (1 + #{at least as large}) / (1 + draws).
        If both are draws of one distribution every division is as likely as the one that came, so
        that P(p <= a) <= a for every a, however small the sets are.
    Source: Gretton et al. 2012, "A kernel two-sample test"; Binkowski et al. 2018,
        arXiv:1801.01401, for the kernel.

    Args:
        first, second: (N, F) and (M, F) float32; memory grows with (N + M)^2.
        permutations: draws.
        seed: of the draws.
    """
    from torchmetrics.image.kid import poly_kernel

    n, m = len(first), len(second)
    if min(n, m) < LEAST:
        return None
    pooled = torch.cat([first, second]).double()
    # In float64 and without the diagonal: pairs of a vector with itself are no pairs.
    kernel = poly_kernel(pooled, pooled)
    kernel.fill_diagonal_(0)
    own = torch.zeros(1, n + m, dtype=torch.float64)
    own[0, :n] = 1
    value = float(_mmd(kernel, own, n, m))
    generator = torch.Generator().manual_seed(seed)
    rounding = 1e-12 * float(kernel.abs().mean())  # of sums in another order
    found = 0
    for start in range(0, permutations, _CHUNK):
        count = min(_CHUNK, permutations - start)
        order = torch.rand(count, n + m, generator=generator).argsort(1)
        drawn = torch.zeros(count, n + m, dtype=torch.float64).scatter_(1, order[:, :n], 1.0)
        found += int((_mmd(kernel, drawn, n, m) >= value - rounding).sum())
    return TwoSample(value=value, p_value=(1 + found) / (1 + permutations), first=n, second=m)


def _mmd(kernel: Tensor, member: Tensor, n: int, m: int) -> Tensor:
    """(P,) squared MMD of P divisions of the pooled vectors.

    Args:
        kernel: (N + M, N + M), its diagonal 0.
        member: (P, N + M), 1 where a vector belongs to the first set, else 0.
        n, m: sizes of both sets.
    """
    within = ((member @ kernel) * member).sum(1)
    touching = member @ kernel.sum(1)  # all pairs with one of the first set: within and across
    across = touching - within
    other = kernel.sum() - within - 2 * across
    return within / (n * (n - 1)) + other / (m * (m - 1)) - 2 * across / (n * m)

"""What would be scored without a model: the true image, blurred, and the nearest training images.

Meant to stand beside every retrieval score: on data whose captions compose, copying the nearest
training images goes a long way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

TONES = (
    "light skin tone",
    "medium-light skin tone",
    "medium skin tone",
    "medium-dark skin tone",
    "dark skin tone",
)
"""From light to dark, as the labels of the embedded data set name them."""
_UNTONED = 7
"""Distance from a tone to no tone: further than any other tone."""


def tone_distance(a: str, b: str) -> int:
    """Steps between two tone labels, summed over the people of a picture."""
    first, second = _tones(a), _tones(b)
    if len(first) != len(second):
        # One tone beside two: both people are taken to have it.
        first, second = (f * 2 if len(f) == 1 else f for f in (first, second))
    if len(first) != len(second):
        return _UNTONED * 2
    return sum(abs(x - y) for x, y in zip(first, second, strict=True))


def _tones(label: str) -> tuple[int, ...]:
    parts = [part.strip() for part in label.split(",")]
    return tuple(TONES.index(part) + 1 for part in parts if part in TONES)


def nearest_by_tone(
    labels: Sequence[dict[str, str]], train_labels: Sequence[dict[str, str]]
) -> Tensor | None:
    """For each sample the two training samples that differ from it least.

    The same concept comes first, then the same gender and hair, then the nearest tone.

    Args:
        labels: of the Q samples to find siblings for.
        train_labels: of the N training samples.

    Returns:
        (Q, 2) int64 rows of the training samples, or None where the data set has no tones.
    """
    if not any("tone" in found for found in train_labels):
        return None
    by_concept: dict[str, list[int]] = {}
    for row, found in enumerate(train_labels):
        by_concept.setdefault(found.get("concept", ""), []).append(row)

    def difference(wanted: dict[str, str], row: int) -> tuple[int, int, int]:
        came = train_labels[row]
        kind = sum(wanted.get(name) != came.get(name) for name in ("gender", "hair"))
        return kind, tone_distance(wanted.get("tone", ""), came.get("tone", "")), row

    nearest = []
    for wanted in labels:
        rows = by_concept.get(wanted.get("concept", ""), list(range(len(train_labels))))
        ordered = sorted(rows, key=lambda row: difference(wanted, row))
        nearest.append((ordered * 2)[:2])
    return torch.tensor(nearest)

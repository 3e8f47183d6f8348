"""Splits by composition: what is tested has been seen, but never in this combination.

A composition is a concept (without gender, with hair) and its skin tones. A whole composition goes
to one split, so no gender sibling of a test image with the same tone is trained on. Compositions
that share a picture, pixel by pixel, go together. Every concept and every tone outside the training
split occurs in it in other combinations.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, order=True, slots=True)
class Composition:
    """What a picture combines."""

    concept: tuple[str, str]
    """(concept without gender, hair)."""
    tone: str


def assign_splits(
    compositions: Sequence[Composition],
    pictures: Sequence[str],
    *,
    validation_share: float,
    test_share: float,
) -> list[str]:
    """The split of each picture; depends neither on their order nor on the machine.

    Args:
        compositions: of each picture.
        pictures: digest of each picture's pixels.
        validation_share, test_share: of the compositions that can be held out.

    Returns:
        a name out of `sdn.data.records.SPLITS` for each picture.
    """
    groups = _groups(compositions, pictures)
    alternatives = Counter(composition.concept for composition in set(compositions))
    split = {}
    for members in set(groups.values()):
        draw = _draw(min(members))
        held_out = all(alternatives[member.concept] > 1 for member in members)
        if held_out and draw < test_share:
            split[members] = "test"
        elif held_out and draw < test_share + validation_share:
            split[members] = "validation"
        else:
            split[members] = "train"
    _complete_training(split)
    return [split[groups[composition]] for composition in compositions]


def _groups(
    compositions: Sequence[Composition], pictures: Sequence[str]
) -> dict[Composition, frozenset[Composition]]:
    """Compositions joined wherever they share a picture."""
    member_of: dict[Composition, set[Composition]] = {c: {c} for c in compositions}
    owner: dict[str, Composition] = {}
    for composition, picture in zip(compositions, pictures, strict=True):
        other = owner.setdefault(picture, composition)
        if member_of[other] is not member_of[composition]:
            joined = member_of[other] | member_of[composition]
            for member in joined:
                member_of[member] = joined
    frozen = {id(members): frozenset(members) for members in member_of.values()}
    return {composition: frozen[id(members)] for composition, members in member_of.items()}


def _complete_training(split: dict[frozenset[Composition], str]) -> None:
    """Move groups to training until it holds every concept and every tone that is held out."""
    while True:
        trained = [c for members, name in split.items() if name == "train" for c in members]
        concepts, tones = {c.concept for c in trained}, {c.tone for c in trained}
        lacking = [
            members
            for members, name in split.items()
            if name != "train"
            and any(c.concept not in concepts or c.tone not in tones for c in members)
        ]
        if not lacking:
            return
        # One at a time: it may supply what the others lack.
        split[max(lacking, key=lambda members: _draw(min(members)))] = "train"


def _draw(composition: Composition) -> float:
    """A number in [0, 1) that is the composition's own."""
    text = "|".join((*composition.concept, composition.tone))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64

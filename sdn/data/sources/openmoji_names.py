"""CLDR short names of emoji, with the prefixes and commas that package `emoji` drops.

The package knows "woman dark skin tone curly hair"; CLDR says "woman: dark skin tone, curly hair".
What belongs behind the colon is read off the code points.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from sdn.baselines import TONES

_TONE_POINTS = dict(zip(range(0x1F3FB, 0x1F400), TONES, strict=True))
_TONE_WORDS = re.compile(r"\b(?:medium-light|medium-dark|light|medium|dark) skin tone\b")
_HAIR_POINTS = {
    0x1F9B0: "red hair",
    0x1F9B1: "curly hair",
    0x1F9B3: "white hair",
    0x1F9B2: "bald",
    0x1F471: "blond hair",
    0x1F9D4: "beard",
}
_PERSONS = {
    0x1F468: "man", 0x1F469: "woman", 0x1F9D1: "person", 0x1F466: "boy", 0x1F467: "girl",
    0x1F9D2: "child", 0x2642: "man", 0x2640: "woman",
}  # fmt: skip
_GROUPS = ("family", "kiss", "couple with heart")
"""Names followed by the people in the picture."""
_GENDER_WORDS = re.compile(
    r"\b(?:woman and man|man|woman|person|men|women|people|boy|girl|adult|child)\b(?![\u2019'-]) ?"
)
_RESPELLED = {
    "Congo-Brazzaville": "Congo - Brazzaville",
    "Congo-Kinshasa": "Congo - Kinshasa",
    "St. Helena Ascension & Tristan da Cunha": "St. Helena, Ascension & Tristan da Cunha",
}
"""Names whose blanks or commas the package drops -> as CLDR writes them."""
_QUOTED = re.compile(r"Japanese (.+) button")
_KEYCAP_TEN = 0x1F51F
_NEUTRAL = {
    "mermaid": ("merperson", "woman"),
    "merman": ("merperson", "man"),
    "merperson": ("merperson", "person"),
    "old man": ("older person", "man"),
    "old woman": ("older person", "woman"),
    "older person": ("older person", "person"),
    "boy": ("child", "man"),
    "girl": ("child", "woman"),
    "child": ("child", "person"),
    "man": ("person", "man"),
    "woman": ("person", "woman"),
    "person": ("person", "person"),
    "prince": ("person with crown", "man"),
    "princess": ("person with crown", "woman"),
    "person with crown": ("person with crown", "person"),
    "kiss": ("kiss", "person, person"),
    "couple with heart": ("couple with heart", "person, person"),
    "female sign": ("female sign", "none"),
    "male sign": ("male sign", "none"),
    "Santa Claus": ("Santa Claus", "man"),
    "Mrs. Claus": ("Santa Claus", "woman"),
    "Mx Claus": ("Santa Claus", "person"),
    "man dancing": ("dancing", "man"),
    "woman dancing": ("dancing", "woman"),
    "woman with headscarf": ("with headscarf", "woman"),
}
"""Heads whose gender is not a word of its own -> (neutral concept, gender)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """An emoji's name and what it says."""

    caption: str
    labels: dict[str, str]
    """concept (no gender, tone or hair), tone, gender, hair; "none" where it has none."""


def name_of(hexcode: str) -> Named | str:
    """The name of the emoji with this file name, such as `1F385-1F3FF`, or why it has none."""
    points = [int(part, 16) for part in hexcode.split("-")]
    text = _known_names().get("".join(map(chr, points)))
    if text is None:
        return _reason(points)
    tones = _unique_if_equal([_TONE_POINTS[p] for p in points if p in _TONE_POINTS])
    hair = next((_HAIR_POINTS[p] for p in points if p in _HAIR_POINTS), "none")
    if len(points) == 1 and (tones or points[0] in range(0x1F9B0, 0x1F9B4)):
        # A swatch of a tone or a piece of hair: the name is the whole caption.
        return _named(text, concept="swatch", tone=", ".join(tones) or "none", hair=hair)
    plain = _respelled(" ".join(_TONE_WORDS.sub("", text).split()))
    if _is_flag(points):
        return _named(f"flag: {plain}", concept=f"flag: {plain}")
    if 0x20E3 in points or points == [_KEYCAP_TEN]:
        return _named(f"keycap: {plain.removeprefix('keycap ')}", concept="keycap")
    head, people = _people(plain)
    head, hair_detail = _hair(head, hair)
    details = [*people, *tones, *hair_detail]
    concept, gender = _concept(head, points, people)
    return _named(
        f"{head}: {', '.join(details)}" if details else head,
        concept=concept,
        tone=", ".join(tones) or "none",
        gender=gender,
        hair=hair,
    )


def _named(
    caption: str, *, concept: str, tone: str = "none", gender: str = "none", hair: str = "none"
) -> Named:
    labels = {"concept": concept, "tone": tone, "gender": gender, "hair": hair}
    return Named(caption=caption, labels=labels)


@cache
def _known_names() -> dict[str, str]:
    import emoji

    data: dict[str, dict[str, Any]] = emoji.EMOJI_DATA
    return {found: entry["en"].strip(":").replace("_", " ") for found, entry in data.items()}


def _respelled(plain: str) -> str:
    """The name with CLDR's own punctuation."""
    return _RESPELLED.get(plain) or _QUOTED.sub("Japanese \u201c\\1\u201d button", plain)


def _reason(points: list[int]) -> str:
    if any(0xE000 <= p <= 0xF8FF or p >= 0xF0000 for p in points):
        return "private use code point: no Unicode name"
    if len(points) == 1 and 0x1F1E6 <= points[0] <= 0x1F1FF:
        return "regional indicator letter: half of a flag"
    if points[0] == 0x1F3F4 and points[-1] == 0xE007F:
        return "flag of a region that Unicode does not recommend: no CLDR short name"
    return "not an emoji of Unicode's recommended set: no CLDR short name"


def _is_flag(points: list[int]) -> bool:
    """Two regional indicators, or a tag sequence on the black flag."""
    pair = len(points) == 2 and all(0x1F1E6 <= p <= 0x1F1FF for p in points)
    return pair or points[-1] == 0xE007F


def _people(plain: str) -> tuple[str, list[str]]:
    """The head and the people named after it: "kiss woman man" -> "kiss", ["woman", "man"]."""
    for group in _GROUPS:
        rest = plain.removeprefix(group).split()
        if plain.startswith(group) and all(word in _PEOPLE for word in rest):
            return group, rest
    return plain, []


_PEOPLE = {*_PERSONS.values(), "adult"}


def _hair(head: str, hair: str) -> tuple[str, list[str]]:
    """The head without its hair, and the hair as a detail: "woman curly hair" -> "woman"."""
    if hair != "none" and head.endswith(f" {hair}"):
        return head.removesuffix(f" {hair}"), [hair]
    return head, []


def _concept(head: str, points: list[int], people: list[str]) -> tuple[str, str]:
    """The head without its gender, and the gender or genders of the people in the picture."""
    if people:
        return head, ", ".join(people)
    if head in _NEUTRAL:
        return _NEUTRAL[head]
    persons = [_PERSONS[p] for p in points if p in _PERSONS]
    words = _GENDER_WORDS.findall(head)
    if not words and not persons:
        return head, "person" if _has_genders(points[0]) else "none"
    concept = " ".join(_GENDER_WORDS.sub("", head).split()) or head
    gender = {
        "men": "man", "women": "woman", "people": "person", "woman and man": "woman, man",
    }  # fmt: skip
    named = [gender.get(word.strip(), word.strip()) for word in words]
    return concept, (named[0] if named else persons[0])


def _has_genders(point: int) -> bool:
    """Whether a picture without gender, such as the guard, also comes as a man and a woman."""
    return f"{chr(point)}\u200d\u2642\ufe0f" in _known_names()


def _unique_if_equal(tones: list[str]) -> list[str]:
    """CLDR names a tone once where all people share it."""
    return tones[:1] if len(set(tones)) == 1 else tones

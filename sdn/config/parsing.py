"""Configs from plain values and from what a person sets, and back."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


CAME_LATER = {"validation_from_train": False, "noise_scale": 1.0}
"""Settings that there were not always, with the value by which they change nothing."""


def to_key(config: Any) -> dict[str, Any]:
    """As `to_dict`, for a digest: without settings that came later, while they change nothing.

    So what was made before there were such settings is found again.
    """
    return _without_later(to_dict(config))


def _without_later(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_later(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in CAME_LATER or value != CAME_LATER[name]
    }


def from_dict(kind: type[T], values: dict[str, Any], where: str = "") -> T:
    """The config of this kind from plain values.

    Args:
        kind: a config, or one of its groups.
        values: of its keys; the others take their defaults.
        where: the group's place with a dot behind it, for errors: `stage_one.`.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of another type, or one
            that the config refuses; it begins with the whole key.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name: hints[f.name] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    parsed = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(_unknown(f"{where}{key}", key, list(known), where))
        parsed[key] = _parse(known[key], value, f"{where}{key}")
    try:
        return kind(**parsed)
    except ValueError as error:  # it begins with the group's own key: stages share their class
        raise ValueError(f"{where}{error}") from error


def with_overrides(config: T, overrides: dict[str, str]) -> T:
    """The same config with dotted keys replaced: `{"stage_two.epochs": "3"}`.

    Values are read as JSON and, where that fails, as text.

    Raises:
        ValueError: an unknown key, a value of another type, or one that the config refuses.
    """
    values = to_dict(config)
    for dotted, text in overrides.items():
        *path, last = dotted.split(".")
        inner = values
        for depth, part in enumerate(path):
            if part not in inner or not isinstance(inner[part], dict):
                prefix = "".join(f"{p}." for p in path[:depth])
                raise ValueError(_unknown(dotted, part, list(inner), prefix))
            inner = inner[part]
        inner[last] = _value(type(config), dotted, text)
    return from_dict(type(config), values)


def _value(kind: Any, dotted: str, text: str) -> Any:
    """The text as JSON, or as it stands where the key holds text (`1.50` stays `1.50`)."""
    for part in dotted.split("."):
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    if text != "null" and (kind is str or kind == str | None):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _unknown(dotted: str, part: str, known: list[str], prefix: str) -> str:
    near = difflib.get_close_matches(part, known, n=1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else "."
    return f"unknown config key {dotted!r}{hint} Known here: {', '.join(prefix + k for k in known)}"


def _parse(kind: Any, value: Any, where: str) -> Any:  # noqa: C901, PLR0911 (one case a type)
    """`value` as the annotated type `kind`, or a ValueError that names the key."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is a group of keys, not the value {value!r}")
        return from_dict(typing.cast("type[Any]", kind), value, f"{where}.")
    origin = typing.get_origin(kind)
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{where} must be one of {typing.get_args(kind)}, not {value!r}")
        return value
    if origin is types.UnionType:  # `X | None` is the only union in use
        (inner,) = (a for a in typing.get_args(kind) if a is not type(None))
        return None if value is None else _parse(inner, value, where)
    if origin is dict:
        inner = typing.get_args(kind)[1]
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a JSON object, not {value!r}")
        return {str(k): _entry(inner, v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{where} must be {kind.__name__}, not {value!r}")
    return value


def _entry(kind: Any, value: Any, where: str) -> Any:
    """A value of an object whose names are the user's: what it refuses names the entry."""
    try:
        return _parse(kind, value, where)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if where in text else f"{where}: {text}") from error

"""`metadata.jsonl` of Hugging Face's imagefolder: captions, splits and labels of images."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from sdn.data.records import DeadLetter

METADATA = "metadata.jsonl"
SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
"""Names that a field `split` or a folder may have -> split."""
_CAPTION_FIELDS = ("text", "caption")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What is said about one image."""

    captions: tuple[str, ...] = ()
    split: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


class Metadata:
    """All metadata files of a folder, read one after the other."""

    def __init__(self, root: Path) -> None:
        """Of the folder to which all paths are relative."""
        self.entries: dict[PurePath, Entry] = {}
        self.dead_letters: list[DeadLetter] = []
        self._root = root

    def read(self, path: PurePath) -> None:
        """Add the lines of one file; those that cannot be used become dead letters."""
        with (self._root / path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    self._add(path, number, line)

    def _add(self, path: PurePath, number: int, line: bytes) -> None:
        key = where = f"{path.as_posix()}:{number}"
        try:
            values = _parse(line)
            image = _image_path(self._root, path.parent, values.pop("file_name", None))
            key = image.as_posix()
            self.entries[image] = _joined(self.entries.get(image), _entry(values))
        except ValueError as error:
            self.dead_letters.append(
                DeadLetter(key=key, where=where, reason=f"{path.as_posix()} line {number}: {error}")
            )


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8, but byte {error.start} of the line is not") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        # A fault in the data, which becomes a dead letter like any other.
        raise ValueError(f"expected a JSON object, not {type(values).__name__}")  # noqa: TRY004
    return values


def _image_path(root: Path, folder: PurePath, name: Any) -> PurePath:
    """The image of a line, relative to the root."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"file_name must name the image, not {name!r}")
    if "\0" in name or PurePath(name).is_absolute():
        raise ValueError(f"file_name must be a path inside the folder, not {name!r}")
    path = PurePath(os.path.normpath(folder / name))
    if path.parts[:1] == ("..",):
        raise ValueError(f"file_name must be a path inside the folder, not {name!r}")
    if not (root / path).is_file():
        raise ValueError(f"there is no file {path.as_posix()}")
    return path


def _entry(values: dict[str, Any]) -> Entry:
    captions: list[str] = []
    for name in _CAPTION_FIELDS:
        captions += _texts(name, values.pop(name, None))
    return Entry(
        captions=tuple(captions),
        split=_split(values.pop("split", None)),
        labels={name: value for name, value in values.items() if isinstance(value, str)},
    )


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a text or a list of texts, not {value!r}")
    return [text for text in texts if text.strip()]


def _split(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in SPLIT_NAMES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_NAMES)}, not {value!r}")
    return SPLIT_NAMES[value]


def _joined(before: Entry | None, entry: Entry) -> Entry:
    """A file may have a line for each caption, as long as they agree on the rest."""
    if before is None:
        return entry
    if (before.split, before.labels) != (entry.split, entry.labels):
        raise ValueError("an earlier line names the same file with another split or other labels")
    return Entry(captions=before.captions + entry.captions, split=entry.split, labels=entry.labels)

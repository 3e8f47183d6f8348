"""Sources: one reader of each layout. A reader is `read(config) -> iterator of source items`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from sdn.config import DataConfig
    from sdn.data.records import SourceItem

SOURCES = {
    "cub": "CUB-200-2011 with Reed's captions; path: the folder that holds CUB_200_2011/",
    "folder": "images with captions beside them (.txt) or in metadata.jsonl; path: the folder",
    "openmoji": "the embedded data set, OpenMoji (extra `openmoji`); no path",
}
"""Name of a reader -> what it reads."""


def read_source(config: DataConfig) -> Iterator[SourceItem]:
    """Everything that the configured source holds.

    Raises:
        ValueError: no such source, or its folder is not of the expected layout.
    """
    items: Iterator[SourceItem] = _reader(config.source).read(config)
    return items


def attribution(source: str) -> str | None:
    """The line that must stand beside published pictures of a source, where there is one.

    Raises:
        ValueError: no such source.
    """
    line: str | None = getattr(_reader(source), "ATTRIBUTION", None)
    return line


def _reader(source: str) -> ModuleType:
    if source not in SOURCES:
        raise ValueError(f"no source {source!r}; there are: {', '.join(SOURCES)}")
    return import_module(f"sdn.data.sources.{source}")

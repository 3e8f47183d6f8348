"""Sources: one reader of each layout.

A reader is a module with `partitions(config, files) -> iterator of Partition`. The partitions are
the source cut into pieces that can be read by themselves, on another machine too; which they are
depends on nothing but the source and the config. `files` is where `config.path` lies, None for a
source that carries its own data.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sdn.data.files import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from sdn.config import DataConfig
    from sdn.data.files import Files
    from sdn.data.records import SourceItem

SOURCES = {
    "coco": "COCO captions; path: the folder with annotations/captions_*.json and the images",
    "cub": "CUB-200-2011 with Reed's captions; path: the folder that holds CUB_200_2011/",
    "flowers": "Oxford-102 flowers with Reed's captions; path: the folder with jpg/",
    "folder": "images with .txt beside them, metadata.jsonl or captions.csv; a folder or s3://",
    "openmoji": "the embedded data set, OpenMoji (extra `openmoji`); no path",
    "parquet": "Hugging Face's layout: images and captions in parquet; a folder or s3://",
    "shards": "a data set that `sdn prepare` made, used where it lies; a folder or s3://",
    "tars": "WebDataset and img2dataset tars; a folder or s3://",
}
"""Name of a reader -> what it reads."""

REMOTE = ("folder", "parquet", "tars")
"""Sources that can lie on S3."""
PREPARED = "shards"
"""The one source that is not read into another data set."""

PARTITION_RECORDS = 250
"""About how many records a partition has, where its source can be cut anywhere."""


class Partition(Protocol):
    """A piece of a source; can be pickled, and read any number of times."""

    def items(self) -> Iterator[SourceItem]:
        """All that the piece holds, in an order of its own; one image in memory at a time."""


@dataclass(frozen=True, slots=True)
class Given:
    """A piece whose items are there already."""

    some: tuple[SourceItem, ...]

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        return iter(self.some)


def partitions(config: DataConfig, files: Files | None = None) -> Iterator[Partition]:
    """The configured source in pieces, in the order in which they are written.

    Args:
        config: names the source and its path.
        files: where the path lies; None opens a local path.

    Raises:
        ValueError: no such source, or its path is not of the expected layout.
    """
    found: Iterator[Partition] = _reader(config.source).partitions(
        config, files or open_source(config)
    )
    return found


def read_source(config: DataConfig, files: Files | None = None) -> Iterator[SourceItem]:
    """Everything that the configured source holds, one after the other.

    Raises:
        ValueError: as `partitions`.
    """
    pieces = partitions(config, files)
    return itertools.chain.from_iterable(piece.items() for piece in pieces)


def attribution(source: str) -> str | None:
    """The line that must stand beside published pictures of a source, where there is one.

    Raises:
        ValueError: no such source.
    """
    line: str | None = getattr(_reader(source), "ATTRIBUTION", None)
    return line


def open_source(config: DataConfig) -> Files | None:
    """The local folder where a source lies; None for one that carries its own data.

    Raises:
        ValueError: the path is no local one.
    """
    if config.path is None:
        return None
    if "://" in config.path:
        raise ValueError(
            f"data.path is {config.path}: expected a folder, or s3://bucket/prefix for the sources "
            f"{', '.join(REMOTE)} (with `sdn`, not `python -m sdn`)"
        )
    return LocalFolder(Path(config.path).expanduser())


def require_known(source: str) -> None:
    """Refuse a source that there is not.

    Raises:
        ValueError: the text names those there are.
    """
    if source not in SOURCES:
        raise ValueError(f"no source {source!r}; there are: {', '.join(SOURCES)}")


def _reader(source: str) -> ModuleType:
    require_known(source)
    if source == PREPARED:
        raise ValueError(f"the source {source!r} is prepared already: `sdn run` takes it as it is")
    return import_module(f"sdn.data.sources.{source}")

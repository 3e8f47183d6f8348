"""One version of a data set, opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdn.data.files import LocalFolder
from sdn.data.manifest import Manifest, ShardTable, read_manifest

if TYPE_CHECKING:
    from sdn.data.files import Files


class DataSet:
    """A manifest with the place it was read from; the tables of its shards are read when asked."""

    def __init__(self, files: Files, manifest: Manifest) -> None:
        self.files = files
        self.manifest = manifest
        self._tables: dict[str, ShardTable] = {}

    def shards(self, split: str) -> ShardTable:
        """The shards of a split, in order.

        Raises:
            ValueError: an unknown split, or a table that is missing or damaged.
        """
        if split not in self._tables:
            self._tables[split] = ShardTable(self.files, self.manifest, split)
        return self._tables[split]

    def samples(self, split: str) -> int:
        """Samples of a split.

        Raises:
            ValueError: an unknown split.
        """
        return self.manifest.samples(split)


def open_dataset(place: DataSet | Files | Path | str, version: str | None = None) -> DataSet:
    """The data set in a folder or at another place: its newest version, or the one named.

    Args:
        place: a local folder, or `Files` of any kind; a data set that is open stays as it is.
        version: beginning of a version's digest.

    Raises:
        ValueError: no data set, a damaged one, one of another format, or no such version.
    """
    if isinstance(place, DataSet):
        return place
    files: Files = LocalFolder(place) if isinstance(place, (str, Path)) else place
    return DataSet(files, read_manifest(files, version))

"""Dead letters tried again, after a fix of the source or of what prepares it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdn.data.dead_letters import KeptLetter, read_list
from sdn.data.files import Files
from sdn.data.manifest import read_manifest
from sdn.data.records import DeadLetter, Record
from sdn.data.shards import Writing, append_dataset
from sdn.data.sources import Partition

if TYPE_CHECKING:
    from sdn.data.manifest import Manifest
    from sdn.data.records import SourceItem

_LETTERS_A_PARTITION = 100


def retry_dead_letters(
    files: Files, writing: Writing, source: Iterable[Partition] | None
) -> Manifest | None:
    """Prepare what had failed, and append what succeeds now as a new version.

    Args:
        files: a data set with dead letters.
        writing: how; its config prepares as the data set was prepared.
        source: the source as it is now, in which only the dead letters are looked up; None takes
            the originals that the data set kept.

    Returns:
        The new version, with the dead letters that are left; None where none was mended.

    Raises:
        ValueError: no data set, or another preparation.
    """
    letters = list(read_list(files, read_manifest(files).dead_letter_file))
    if not letters:
        return None
    partitions: Iterable[Partition]
    if source is None:
        partitions = [
            Kept(files, tuple(letters[first : first + _LETTERS_A_PARTITION]))
            for first in range(0, len(letters), _LETTERS_A_PARTITION)
        ]
    else:
        wanted = frozenset(x.key for x in letters) | frozenset(x.where for x in letters)
        partitions = (Wanted(partition, wanted) for partition in source)
    return append_dataset(partitions, files, replace(writing, budget=False))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of a partition, what had become a dead letter, or lies in a file that had."""

    partition: Partition
    names: frozenset[str]
    """Keys and places of the dead letters."""

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`; what the source leaves out by rule was counted before."""
        for item in self.partition.items():
            if isinstance(item, (Record, DeadLetter)) and self._wanted(item):
                yield item

    def _wanted(self, item: Record | DeadLetter) -> bool:
        file = item.where.partition(":")[0]
        return item.key in self.names or item.where in self.names or file in self.names


@dataclass(frozen=True, slots=True)
class Kept:
    """Dead letters out of the originals that the data set kept."""

    files: Files
    letters: tuple[KeptLetter, ...]

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        for letter in self.letters:
            try:
                record = letter.as_record(self.files)
            except OSError as error:
                reason = f"{letter.reason} (and its original cannot be read: {error})"
                yield DeadLetter(key=letter.key, where=letter.where, reason=reason)
                continue
            if record is not None:
                yield record

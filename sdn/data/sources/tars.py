"""Tars of WebDataset and of img2dataset: an image, texts and JSON a sample; also our own shards.

A sample is what consecutive members have in common up to the first dot of their names: an image
(`key.jpg`, ...), captions (`key.txt` or `key.caption`, one a line, or in `key.json`), labels
(`key.json`, `key.cls`). The split is the one that a tar's name or its folder begins with
(`train-000.tar`, `val/000.tar`), else the JSON's `split`, else it is drawn by the hash of the
image; with `data.validation_from_train` some of train is drawn to validate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources import PARTITION_RECORDS
from sdn.data.sources.captioned_files import split_of_image
from sdn.data.sources.layouts import found_in, place, split_in_name
from sdn.data.sources.listing import Listing, path_hash, plain_key
from sdn.data.sources.tars_members import DamagedTarError, Members
from sdn.data.sources.tars_samples import Ignored, Refused, Sample, samples, split_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.config import DataConfig
    from sdn.data.files import Files
    from sdn.data.records import SourceItem
    from sdn.data.sources import Partition
    from sdn.data.sources.listing import Entry

_TAR = re.compile(r"\.(tar|tar\.gz|tgz)$", re.IGNORECASE)
_KEY_BYTES = 90


@dataclass(frozen=True, slots=True)
class _Tar:
    """One archive."""

    files: Files
    config: DataConfig
    name: str
    key: str
    """What the keys of its samples begin with."""

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        # On disk, as a tar may have any number of samples.
        seen = Listing()
        try:
            with self.files.open(self.name) as file:
                for found in samples(Members(file)):
                    yield self._item(found, seen)
        except DamagedTarError as error:
            reason = f"{error}; what came whole before it is used; get the file again"
            yield DeadLetter(key=self.key, where=self.name, reason=reason)
        finally:
            seen.close()

    def _item(self, found: Sample | Refused | Ignored, seen: Listing) -> SourceItem:
        if isinstance(found, Sample):
            return self._sample(found, seen)
        if isinstance(found, Ignored):
            return Exclusion(
                key=self._key(found.name), reason="a member that is no part of a sample"
            )
        where = f"{self.name}:{found.name}"
        reason = f"the member {found.name[:200]!r} is refused: {found.reason}"
        return DeadLetter(key=self._key(found.name), where=where, reason=reason)

    def _sample(self, sample: Sample, seen: Listing) -> Record | DeadLetter:
        key, where = self._key(sample.key), f"{self.name}:{sample.key}"
        if not seen.add(sample.key):
            reason = f"an earlier sample of this tar has the same key, {sample.key!r}"
            return DeadLetter(key=key, where=where, reason=reason, image=sample.image)
        try:
            return self._record(sample, key, where)
        except ValueError as error:
            return DeadLetter(key=key, where=where, reason=str(error), image=sample.image)

    def _record(self, sample: Sample, key: str, where: str) -> Record:
        image, about = sample.only_image(), sample.about()
        split = split_in_name(self.name) or split_of(about)
        return Record(
            key=key,
            image=image,
            captions=sample.captions(about, self.config.caption_field),
            split=split_of_image(split, image, self.config),
            labels=sample.labels(about),
            where=where,
        )

    def _key(self, name: str) -> str:
        """Tars of one source may share the keys of their samples, so the tar's goes before it."""
        key = f"{self.key}-{name}"
        if plain_key(f"{name}.x") == name and len(key.encode()) <= _KEY_BYTES:
            return key
        return f"{plain_key(f'{key}.x')}-{path_hash(f'{self.name}/{name}')[:16]}"


@dataclass(frozen=True, slots=True)
class _Others:
    """Files that are no tars."""

    entries: tuple[Entry, ...]

    def items(self) -> Iterator[SourceItem]:
        """As in `Partition`."""
        for entry in self.entries:
            yield Exclusion(key=entry.key, reason="a file that is no tar")


def partitions(config: DataConfig, files: Files | None) -> Iterator[Partition]:
    """A partition each tar, in the order of their paths' hashes.

    Raises:
        ValueError: there is no tar.
    """
    files = place(config, files, "a folder with *.tar, *.tar.gz or *.tgz")
    tars, others = Listing(), Listing()
    for about in files.walk():
        if _TAR.search(about.name):
            tars.add(about.name, key_from=f"{_TAR.sub('', about.name)}.tar")
        else:
            others.add(about.name)
    if not len(tars):
        raise ValueError(
            f"{files.uri} has no *.tar, *.tar.gz or *.tgz; {found_in(files)}; data.path must be a "
            "folder above the tars"
        )
    return _pieces(config, files, tars, others)


def _pieces(
    config: DataConfig, files: Files, tars: Listing, others: Listing
) -> Iterator[Partition]:
    keys = Listing()
    try:
        for entry in tars:
            keys.add(entry.key)
        for entry in tars:
            yield _Tar(files, config, entry.path, _prefix(entry, keys))
        yield from (_Others(entries) for entries in others.chunks(PARTITION_RECORDS))
    finally:
        for listing in (tars, others, keys):
            listing.close()


def _prefix(entry: Entry, keys: Listing) -> str:
    """The tar's key; with a hash where `a` and `a-b` could give their samples one key."""
    dashes = [match.start() for match in re.finditer("-", entry.key)]
    if any(keys.get(entry.key[:dash]) is not None for dash in dashes):
        return f"{entry.key}-{path_hash(entry.path)[:16]}"
    return entry.key

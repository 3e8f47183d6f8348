"""Random access to the samples of a data set, every byte of them checked."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from sdn.data.files import LocalFolder
from sdn.data.images import decode_prepared
from sdn.data.index import MEMBERS, IndexRow, Member, from_parquet, scan
from sdn.data.records import Sample

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sdn.data.manifest import Manifest, Shard

_GIB = 1 << 30


class DamagedSample(ValueError):  # noqa: N818 - named for what it reports
    """A sample, or the shard it lies in, is not what the manifest says."""

    def __init__(self, shard: str, key: str | None, reason: str) -> None:
        self.shard, self.key, self.reason = shard, key, reason
        super().__init__(f"{shard}{f', sample {key!r}' if key else ''}: {reason}")

    def __reduce__(self) -> tuple[type[DamagedSample], tuple[str, str | None, str]]:
        """Pickle by the three parts: the error must cross from a worker to its driver."""
        return type(self), (self.shard, self.key, self.reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitArrays:
    """A whole split in memory, in the order of the manifest."""

    keys: tuple[str, ...]
    pixels: Tensor
    """(N, 3, H, W) uint8, RGB."""
    captions: tuple[tuple[str, ...], ...]
    """All captions of each sample, at least one."""
    labels: tuple[dict[str, str], ...]


class ShardReader:
    """The samples of one split by (shard, row). For one thread at a time.

    Decoded samples are kept in memory up to `cache_gib` GiB. When that is full nothing is replaced:
    each sample is read once an epoch, so the oldest one is the next to be needed again.
    """

    def __init__(
        self, folder: Path | str, manifest: Manifest, split: str, *, cache_gib: float = 0.5
    ) -> None:
        self.shards = manifest.shards(split)
        self._files = LocalFolder(folder)
        self._resolution = manifest.resolution
        self._indexes: dict[int, list[IndexRow]] = {}
        self._cache: dict[tuple[int, int], Sample] = {}
        self._cache_left = int(cache_gib * _GIB)

    def read(self, shard: int, row: int) -> Sample:
        """The sample in row `row` of shard number `shard`.

        Raises:
            DamagedSample: the sample, its shard or the shard's index is not what was written.
            IndexError: there is no such shard or row.
        """
        cached = self._cache.get((shard, row))
        if cached is not None:
            return cached
        index = self.index(shard)
        if not 0 <= row < len(index):
            raise IndexError(f"{self.shards[shard].name} has {len(index)} samples, no row {row}")
        sample = self._decode(self.shards[shard], index[row])
        self._keep((shard, row), sample)
        return sample

    def index(self, shard: int) -> list[IndexRow]:
        """Where the samples of this shard lie.

        Raises:
            DamagedSample: the shard is missing or has another length, or its index is damaged.
        """
        if shard not in self._indexes:
            self._indexes[shard] = read_index(self._files, self.shards[shard])
        return self._indexes[shard]

    def close(self) -> None:
        """Close the shards and forget what was cached."""
        self._files.close()
        self._cache.clear()
        self._indexes.clear()

    def _decode(self, shard: Shard, row: IndexRow) -> Sample:
        try:
            # The members of a sample lie side by side: one read brings all three.
            span = self._files.read_range(shard.name, row.start, row.end - row.start)
        except OSError as error:
            raise DamagedSample(shard.name, row.key, f"cannot be read: {error}") from error
        payloads = {m: _payload(span, row, m, shard) for m in MEMBERS}
        try:
            pixels = decode_prepared(payloads["image"], self._resolution)
            about = json.loads(payloads["json"])
            return Sample(
                key=row.key,
                pixels=torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),  # (3, H, W)
                captions=tuple(about["captions"]),
                labels=about["labels"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedSample(shard.name, row.key, str(error)) from error

    def _keep(self, place: tuple[int, int], sample: Sample) -> None:
        size = sample.pixels.nbytes + 100 * (len(sample.captions) + len(sample.labels)) + 500
        if size <= self._cache_left:
            self._cache[place] = sample
            self._cache_left -= size


def read_index(files: LocalFolder, shard: Shard) -> list[IndexRow]:
    """The index of a shard: from its parquet file, or from the tar where pyarrow is missing.

    Either is used only once it matches the manifest's SHA-256.

    Raises:
        DamagedSample: the shard is missing or has another length, or its index (without pyarrow:
            the shard) has another SHA-256.
    """
    try:
        length = files.size(shard.name)
        from_tar = find_spec("pyarrow") is None
        data = files.read(shard.name if from_tar else shard.index_name)
    except OSError as error:
        raise DamagedSample(shard.name, None, f"cannot be read: {error}") from error
    if length != shard.bytes:
        raise DamagedSample(shard.name, None, f"has {length} bytes, expected {shard.bytes}")
    if hashlib.sha256(data).hexdigest() != (shard.sha256 if from_tar else shard.index_sha256):
        what = "the shard" if from_tar else f"its index {shard.index_name}"
        raise DamagedSample(shard.name, None, f"{what} has another SHA-256")
    try:
        rows = scan(io.BytesIO(data)) if from_tar else from_parquet(data)
    except ValueError as error:
        raise DamagedSample(shard.name, None, str(error)) from error
    if len(rows) != shard.samples:
        reason = f"its index has {len(rows)} samples, expected {shard.samples}"
        raise DamagedSample(shard.name, None, reason)
    return rows


def _payload(span: bytes, row: IndexRow, name: str, shard: Shard) -> bytes:
    member: Member = getattr(row, name)
    start = member.offset - row.start
    payload = span[start : start + member.length]
    if len(payload) != member.length:
        reason = f"{name} is cut off after {len(payload)} of {member.length} bytes"
        raise DamagedSample(shard.name, row.key, reason)
    if zlib.crc32(payload) != member.crc32:
        raise DamagedSample(shard.name, row.key, f"{name} has another checksum (CRC-32)")
    return payload

"""Random access to the samples of a data set, every byte of them checked."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import weakref
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from sdn.data.images import decode_jpeg_into, decode_prepared
from sdn.data.index import LOCATION, Index, from_parquet, scan
from sdn.data.records import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from sdn.data.dataset import DataSet
    from sdn.data.files import Files
    from sdn.data.manifest import Shard, ShardTable

_GIB = 1 << 30
_INDEXES = 256
"""Indexes kept whatever their size: several for each of 48 lanes."""
_INDEX_ROWS = 1 << 18
"""Rows kept in more indexes than that: a window of small shards lies in many of them."""
_JPEG = b"\xff\xd8"
_parse_json = json.JSONDecoder().raw_decode


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
    """Decoded samples side by side: a whole split in the order of the manifest, or some of one."""

    keys: tuple[str, ...]
    pixels: Tensor
    """(N, 3, H, W) uint8, RGB."""
    captions: tuple[tuple[str, ...], ...]
    """All captions of each sample, at least one."""
    labels: tuple[dict[str, str], ...]


_Place = tuple[str, str, int, int, int, int, int, int, int]
"""Where a sample lies: its shard, its key, and the numbers of `LOCATION`."""
_About = tuple[str, tuple[str, ...], dict[str, str]]
"""A sample without its pixels: key, captions, labels."""


class ShardReader:
    """The samples of one split by (shard, row). Several threads may use it at once.

    Decoded samples are kept in memory up to `cache_gib` GiB. When that is full nothing is replaced:
    each sample is read once an epoch, so the oldest one is the next to be needed again.
    """

    def __init__(self, dataset: DataSet, split: str, *, cache_gib: float = 0.5) -> None:
        """Of a data set's split.

        Raises:
            ValueError: an unknown split, or a table of shards that is missing or damaged.
        """
        self.shards = dataset.shards(split)
        self.resolution = dataset.manifest.resolution
        self._files = dataset.files
        self._buffers = _Buffers()
        self._indexes = _Indexes(self.shards, dataset.files)
        self._cache = _Cache(int(cache_gib * _GIB)) if cache_gib > 0 else None
        # Places that fetch ahead or keep copies have these two beside what `Files` asks for.
        self._prefetch = getattr(dataset.files, "prefetch", None)
        self._forget = getattr(dataset.files, "forget", None)

    @property
    def fetches_ahead(self) -> bool:
        """Whether it is any use to `announce` samples."""
        return self._prefetch is not None

    def read(self, shard: int, row: int) -> Sample:
        """The sample in row `row` of shard number `shard`.

        Raises:
            DamagedSample: the sample, its shard or the shard's index is not what was written.
            IndexError: there is no such shard or row.
        """
        found = self.read_batch(np.array([shard]), np.array([row]))
        return Sample(
            key=found.keys[0],
            pixels=found.pixels[0].contiguous(),
            captions=found.captions[0],
            labels=found.labels[0],
        )

    def read_batch(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> SplitArrays:
        """The samples in these rows of these shards; their pixels lie channels last in memory.

        Raises:
            DamagedSample, IndexError: as `read`.
        """
        pixels = self._buffers.take((len(rows), self.resolution, self.resolution, 3))
        found = self._cached(shards, rows, pixels)
        missing = np.array([about is None for about in found], bool).nonzero()[0]
        for n, place in self._places(shards, rows, missing):
            found[n] = about = self._decode(place, pixels[n])
            if self._cache is not None:
                self._cache.put((int(shards[n]), int(rows[n])), about, pixels[n])
        keys, captions, labels = zip(*cast("list[_About]", found), strict=True)
        return SplitArrays(
            keys=keys,
            pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2),
            captions=captions,
            labels=labels,
        )

    def announce(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Let the place fetch these samples meanwhile, where it can; damage shows in `read_batch`.

        Raises:
            IndexError: there is no such shard or row.
        """
        if self._prefetch is None:
            return
        for number in self._indexes.missing(shards):
            self._prefetch(self.shards[number].index_name, 0, self.shards[number].index_bytes)
        try:
            for _, (shard, _, offset, length, *_) in self._places(
                shards, rows, np.arange(len(rows))
            ):
                self._prefetch(shard, offset, length)
        except DamagedSample:
            return

    def index(self, shard: int) -> Index:
        """Where the samples of this shard lie.

        Raises:
            DamagedSample: the shard's index is missing or damaged.
        """
        return self._indexes[shard].index

    def close(self) -> None:
        """Close the shards and forget what was cached."""
        self._files.close()
        if self._cache is not None:
            self._cache.clear()
        self._indexes.clear()

    def _places(
        self, shards: NDArray[np.int64], rows: NDArray[np.int64], which: NDArray[np.intp]
    ) -> Iterator[tuple[int, _Place]]:
        """Each of these samples and where it lies: shard by shard, to look once at each index."""
        order = which[np.argsort(shards[which], kind="stable")]
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        for part in np.split(order, cuts) if len(order) else []:
            opened = self._indexes[int(shards[part[0]])]
            yield from zip(part.tolist(), opened.places(rows[part]), strict=True)

    def _decode(self, place: _Place, out: NDArray[np.uint8]) -> _About:
        """Read one sample, its pixels into `out`."""
        shard, key, _, _, _, image_at, image_length, json_at, json_length = place
        span = self._span(place)
        image = span[image_at : image_at + image_length]
        try:
            if image.startswith(_JPEG):
                decode_jpeg_into(image, out)
            else:
                out[:] = decode_prepared(image, self.resolution)
            about, _ = _parse_json(str(span[json_at : json_at + json_length], "utf-8"))
            return key, tuple(about["captions"]), about["labels"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedSample(shard, key, str(error)) from error

    def _span(self, place: _Place) -> bytes:
        """The bytes of a sample, checked."""
        shard, key, _, _, crc32, *_ = place
        span = self._read(place)
        if zlib.crc32(span) != crc32:
            span = self._read_anew(place)
        # The checksum says that the bytes are as written, the key that they are this sample's.
        if not span.startswith(f"{key}.".encode()):
            found = span[:100].partition(b".")[0].decode(errors="replace")
            raise DamagedSample(shard, key, f"sample {found!r} lies in its place")
        return span

    def _read_anew(self, place: _Place) -> bytes:
        """The bytes of a sample whose checksum was wrong: the place may have kept a bad copy."""
        shard, key, _, length, crc32, *_ = place
        if self._forget is not None:
            self._forget(shard)
        span = self._read(place)
        if len(span) != length:
            raise DamagedSample(shard, key, f"is cut off after {len(span)} of {length} bytes")
        if zlib.crc32(span) != crc32:
            raise DamagedSample(shard, key, "has another checksum (CRC-32)")
        return span

    def _read(self, place: _Place) -> bytes:
        try:
            return self._files.read_range(place[0], place[2], place[3])
        except OSError as error:
            raise DamagedSample(place[0], place[1], f"cannot be read: {error}") from error

    def _cached(
        self, shards: NDArray[np.int64], rows: NDArray[np.int64], pixels: NDArray[np.uint8]
    ) -> list[_About | None]:
        """What is kept of these samples, with their pixels filled in; None for all others."""
        if self._cache is None:
            return [None] * len(rows)
        places = zip(shards.tolist(), rows.tolist(), strict=True)
        return [self._cache.get(place, out) for place, out in zip(places, pixels, strict=True)]


class _Opened:
    """The index of one shard."""

    def __init__(self, shard: Shard, index: Index) -> None:
        self.index = index
        self._shard = shard.name
        # A row of one array is taken faster than one value out of each column.
        self._numbers = np.stack([getattr(index, name) for name in LOCATION], axis=1)

    def places(self, rows: NDArray[np.int64]) -> Iterator[_Place]:
        count = len(self.index)
        for row in rows[(rows < 0) | (rows >= count)].tolist():
            raise IndexError(f"{self._shard} has {count} samples, no row {row}")
        keys = self.index.keys
        for row, numbers in zip(rows.tolist(), self._numbers[rows].tolist(), strict=True):
            yield (self._shard, keys[row], *numbers)


class _Indexes:
    """The indexes that were needed last."""

    def __init__(self, shards: ShardTable, files: Files) -> None:
        self._shards, self._files = shards, files
        self._kept: OrderedDict[int, _Opened] = OrderedDict()
        self._rows = 0
        self._lock = threading.Lock()

    def missing(self, shards: NDArray[np.int64]) -> list[int]:
        return [number for number in np.unique(shards).tolist() if number not in self._kept]

    def __getitem__(self, number: int) -> _Opened:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            shard = self._shards[number]
        # Reading takes long: other threads go on. If two read the same index, one of them is kept.
        opened = _Opened(shard, read_index(self._files, shard))
        with self._lock:
            return self._keep(number, opened)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._rows = 0

    def _keep(self, number: int, opened: _Opened) -> _Opened:
        if number not in self._kept:
            self._kept[number] = opened
            self._rows += len(opened.index)
            while len(self._kept) > _INDEXES and self._rows > _INDEX_ROWS:
                self._rows -= len(self._kept.popitem(last=False)[1].index)
        return self._kept[number]


class _Buffers:
    """Arrays that are filled anew once nobody holds what was in them.

    Memory fresh from the system costs a page fault every 4 KiB: a tenth of decoding a small image.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(0, np.uint8)
        if buffer.shape != shape:
            buffer = np.empty(shape, np.uint8)
        # A tensor made from the view holds it as long as any tensor or array shares its memory.
        view = buffer[:]
        weakref.finalize(view, self._free.append, buffer).atexit = False
        return view


class _Cache:
    """Decoded samples up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._kept: dict[tuple[int, int], tuple[_About, NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()

    def get(self, place: tuple[int, int], out: NDArray[np.uint8]) -> _About | None:
        """What is kept of a sample, its pixels into `out`; None if nothing is."""
        found = self._kept.get(place)
        if found is None:
            return None
        out[:] = found[1]
        return found[0]

    def put(self, place: tuple[int, int], about: _About, pixels: NDArray[np.uint8]) -> None:
        size = pixels.nbytes + 100 * (len(about[1]) + len(about[2])) + 700
        with self._lock:
            if size > self._left or place in self._kept:
                return
            self._left -= size
        # A copy: the consumer of the batch may change it.
        self._kept[place] = about, pixels.copy()

    def clear(self) -> None:
        self._left = 0
        self._kept.clear()


def read_index(files: Files, shard: Shard) -> Index:
    """The index of a shard: from its parquet file, or from the tar where pyarrow is missing.

    Either is used only once its length and SHA-256 are the manifest's.

    Raises:
        DamagedSample: the index (without pyarrow: the shard) is missing or damaged.
    """
    from_tar = find_spec("pyarrow") is None
    data = _whole(files, shard) if from_tar else _index_file(files, shard)
    try:
        index = scan(io.BytesIO(data)) if from_tar else from_parquet(data)
    except ValueError as error:
        raise DamagedSample(shard.name, None, str(error)) from error
    if len(index) != shard.samples:
        reason = f"its index has {len(index)} samples, expected {shard.samples}"
        raise DamagedSample(shard.name, None, reason)
    return index


def _whole(files: Files, shard: Shard) -> bytes:
    try:
        data = files.read(shard.name)
    except OSError as error:
        raise DamagedSample(shard.name, None, f"cannot be read: {error}") from error
    if wrong := _difference(data, shard.bytes, shard.sha256):
        raise DamagedSample(shard.name, None, f"the shard {wrong}")
    return data


def _index_file(files: Files, shard: Shard) -> bytes:
    """The parquet file beside a shard; a kept copy that is damaged is forgotten and read anew."""
    name, size, sha256 = shard.index_name, shard.index_bytes, shard.index_sha256
    try:
        data = files.read_range(name, 0, size)  # not `read`: that passes by what was fetched ahead
        forget = getattr(files, "forget", None)
        if forget is not None and _difference(data, size, sha256):
            forget(name)
            data = files.read_range(name, 0, size)
    except OSError as error:
        raise DamagedSample(shard.name, None, f"cannot be read: {error}") from error
    if wrong := _difference(data, size, sha256):
        raise DamagedSample(shard.name, None, f"its index {name} {wrong}")
    return data


def _difference(data: bytes, size: int, sha256: str) -> str | None:
    if len(data) != size:
        return f"has {len(data)} bytes, expected {size}"
    return None if hashlib.sha256(data).hexdigest() == sha256 else "has another SHA-256"

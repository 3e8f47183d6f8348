"""The manifest: one version of a data set. Written last, so a place with one is complete.

`manifest.json` is the newest version; `versions/{digest}.json` keeps every one. Shards stand in it
as columns, one segment for each split and version that added some. A segment of many shards has its
columns in a parquet file beside it, so that a manifest of a million shards opens in no time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sdn.data.index import integers
from sdn.data.records import SPLITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from sdn.data.files import Files

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
VERSIONS = "versions"
INLINE_SHARDS = 4096
"""A segment of more shards keeps its columns in a parquet file."""
COLUMNS = ("name", "bytes", "sha256", "samples", "index_bytes", "index_sha256")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar with its index."""

    name: str
    bytes: int
    sha256: str
    samples: int
    index_bytes: int
    index_sha256: str

    @property
    def index_name(self) -> str:
        """The parquet file beside the tar."""
        return self.name.removesuffix(".tar") + ".parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRef:
    """A file that belongs to a manifest."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Shards of one split that one version added."""

    split: str
    shards: int
    samples: int
    digest: str
    """SHA-256 over names, digests and sample counts of the shards; the index counts for nothing in
    it, since its bytes change with the version of pyarrow."""
    columns: dict[str, list[Any]] | None
    """Name out of `COLUMNS` -> one value a shard; None where `table` has them."""
    table: FileRef | None
    """The columns as a parquet file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One version of a data set."""

    number: int
    """1 for the first version, one more with each that came after."""
    parent: str | None
    """Digest of the version before; None for the first."""
    preparation: dict[str, Any]
    """What the samples depend on: source, resolution, fit, image_format, shard_samples, ..."""
    segments: tuple[Segment, ...]
    """In the order in which they were added."""
    exclusions: dict[str, int]
    """Reason -> how many were left out by rule, in all versions."""
    duplicates: dict[str, int]
    """What was found twice, whether it was left out or not; see `sdn.data.duplicates`."""
    dead_letters: int
    """How many could not be used."""
    dead_letter_file: FileRef
    """JSON lines with key, where and reason of each dead letter; see `sdn.data.dead_letters`."""
    attribution: str | None
    """Whom to name beside images that come from this data."""
    origin: str | None = None
    """Where the source lay; the one field that is not part of the digest."""
    _samples: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        counts = dict.fromkeys(SPLITS, 0)
        for segment in self.segments:
            counts[segment.split] += segment.samples
        object.__setattr__(self, "_samples", counts)

    @property
    def digest(self) -> str:
        """SHA-256 of the content, the same wherever the data set lies."""
        content = _to_json(self)
        del content["origin"]
        for segment in content["segments"]:
            del segment["columns"], segment["table"]
        return _sha256(content)

    @property
    def resolution(self) -> int:
        """Height and width of the images in pixels."""
        return int(self.preparation["resolution"])

    @property
    def counts(self) -> dict[str, int]:
        """Split -> samples."""
        return dict(self._samples)

    def samples(self, split: str) -> int:
        """Samples of a split.

        Raises:
            ValueError: an unknown split.
        """
        if split not in self._samples:
            raise ValueError(f"no split {split!r}; there are: {', '.join(self._samples)}")
        return self._samples[split]


class ShardTable:
    """The shards of one split of a version, by number; columns are read when they are needed."""

    def __init__(self, files: Files, manifest: Manifest, split: str) -> None:
        """Of a manifest that was read from `files`.

        Raises:
            ValueError: an unknown split, or a table that is missing or damaged.
            ImportError: a data set of very many shards, and pyarrow is not installed.
        """
        manifest.samples(split)
        self._parts = [
            _Columns(files, segment) for segment in manifest.segments if segment.split == split
        ]
        self.samples: NDArray[np.int64] = np.concatenate(
            [np.zeros(0, np.int64), *(part.samples() for part in self._parts)]
        )
        """Samples of each shard: what a `Plan` is made from."""
        self._ends = np.cumsum([part.count for part in self._parts])

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.samples)

    def __getitem__(self, number: int) -> Shard:
        """The shard of this number.

        Raises:
            IndexError: there is none.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"no shard {number} of {len(self)}")
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self._parts[part].shard(number - int(self._ends[part] - self._parts[part].count))

    def __iter__(self) -> Iterator[Shard]:
        """All shards in order."""
        return (self[number] for number in range(len(self)))


class _Columns:
    """The columns of one segment, from the manifest itself or from its parquet file."""

    def __init__(self, files: Files, segment: Segment) -> None:
        self.count = segment.shards
        self._inline = segment.columns
        self._group: tuple[int, dict[str, list[Any]]] | None = None
        if segment.columns is None:
            assert segment.table is not None
            self._file = _open_table(files, segment.table)

    def samples(self) -> NDArray[np.int64]:
        if self._inline is not None:
            return np.array(self._inline["samples"], np.int64)
        column = self._file.read(columns=["samples"], use_threads=False)["samples"]
        return integers(column)

    def shard(self, number: int) -> Shard:
        columns, row = (self._inline, number) if self._inline is not None else self._at(number)
        values = {name: columns[name][row] for name in COLUMNS}
        for name in ("sha256", "index_sha256"):
            if isinstance(values[name], bytes):
                values[name] = values[name].hex()
        return Shard(**values)

    def _at(self, number: int) -> tuple[dict[str, list[Any]], int]:
        """The columns of the row group that holds a row, and the row's place in it."""
        group, row = divmod(number, _TABLE_ROWS)
        if self._group is None or self._group[0] != group:
            table = self._file.read_row_group(group, use_threads=False)
            self._group = group, table
        return {name: _Lazy(self._group[1][name]) for name in COLUMNS}, row  # type: ignore[misc]


class _Lazy:
    """A column of a table whose values become Python objects one by one."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __getitem__(self, row: int) -> Any:
        return self._column[row].as_py()


_TABLE_ROWS = 8192
"""Rows a group of a table: what is read to know one shard."""


def read_manifest(files: Files, version: str | None = None) -> Manifest:
    """The newest version of the data set at `files`, or the one whose digest begins so.

    Raises:
        ValueError: no manifest, one that is damaged, one of another format version, or no or
            several such versions.
    """
    name = MANIFEST if version is None else _version_name(files, version)
    try:
        data = files.read(name)
    except FileNotFoundError as error:
        raise ValueError(
            f"{files.uri} holds no data set: {name} is missing (it is written last, so a "
            "preparation that was cut off has none; prepare the data again)"
        ) from error
    return _parse(data, f"{files.uri}/{name}")


def read_versions(files: Files) -> list[Manifest]:
    """The newest version and all that came before it, newest first.

    Raises:
        ValueError: as `read_manifest`; also for a version whose parent is missing.
    """
    versions = [read_manifest(files)]
    while (parent := versions[-1].parent) is not None:
        versions.append(read_manifest(files, parent))
    return versions


def write_manifest(files: Files, manifest: Manifest) -> None:
    """Write the manifest atomically; from then on the place is a data set of this version."""
    files.write(version_file(manifest), _text(_to_json(manifest)))
    make_newest(files, manifest)


def make_newest(files: Files, manifest: Manifest) -> None:
    """Have the place be this version, which it keeps already."""
    files.write(MANIFEST, _text(_to_json(manifest)))


def version_file(manifest: Manifest) -> str:
    """Where a version is kept for good."""
    return f"{VERSIONS}/{manifest.digest}.json"


def make_segment(files: Files, split: str, shards: Iterable[Shard], count: int) -> Segment:
    """The segment of these shards; its table is written where they are too many for the manifest.

    Args:
        files: the data set.
        split: of all the shards.
        shards: in order; read once.
        count: how many they are.
    """
    digest = hashlib.sha256()
    samples = 0

    def passing() -> Iterator[Shard]:
        nonlocal samples
        for shard in shards:
            digest.update(f"{shard.name} {shard.sha256} {shard.samples}\n".encode())
            samples += shard.samples
            yield shard

    columns, table = None, None
    if count <= INLINE_SHARDS:
        rows = list(passing())
        columns = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    else:
        table = _write_table(files, split, passing())
    return Segment(
        split=split,
        shards=count,
        samples=samples,
        digest=digest.hexdigest(),
        columns=columns,
        table=table,
    )


def _write_table(files: Files, split: str, shards: Iterator[Shard]) -> FileRef:
    import itertools
    import tempfile

    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    kinds = {"name": pa.string(), "sha256": pa.binary(32), "index_sha256": pa.binary(32)}
    schema = pa.schema([(name, kinds.get(name, pa.int64())) for name in COLUMNS])
    with tempfile.TemporaryFile() as file:
        # Digests do not repeat: a dictionary would only make them longer.
        with parquet.ParquetWriter(
            file, schema, compression="zstd", use_dictionary=False
        ) as writer:
            while rows := list(itertools.islice(shards, _TABLE_ROWS)):
                values = [[_cell(name, getattr(row, name)) for row in rows] for name in COLUMNS]
                arrays = [pa.array(v, f.type) for v, f in zip(values, schema, strict=True)]
                writer.write_table(pa.table(arrays, schema=schema))
        length = file.tell()
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        name = f"shards-{split}-{sha256[:16]}.table.parquet"
        with files.writing(name) as out:
            while piece := file.read(1 << 20):
                out.write(piece)
    return FileRef(name=name, bytes=length, sha256=sha256)


def _cell(name: str, value: Any) -> Any:
    return bytes.fromhex(value) if name.endswith("sha256") else value


def _open_table(files: Files, table: FileRef) -> Any:
    """The parquet file of a segment, once its digest is what the manifest says."""
    from pyarrow import parquet

    where = f"{files.uri}/{table.name}"
    try:
        found = files.sha256(table.name)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    if found != table.sha256:
        raise ValueError(f"{where} is damaged: it has SHA-256 {found}, expected {table.sha256}")
    return parquet.ParquetFile(files.open(table.name))


def _version_name(files: Files, version: str) -> str:
    prefix = f"{VERSIONS}/"
    digests = sorted(
        info.name.removeprefix(prefix).removesuffix(".json") for info in files.walk(VERSIONS)
    )
    found = [digest for digest in digests if digest.startswith(version)]
    if len(found) != 1 or not version:
        known = ", ".join(digest[:12] for digest in digests) or "none"
        problem = "is not one" if not found else f"is the beginning of {len(found)}"
        raise ValueError(f"{version!r} {problem} of the versions of {files.uri}: {known}")
    return f"{prefix}{found[0]}.json"


def _parse(data: bytes, where: str) -> Manifest:
    try:
        content = json.load(io.BytesIO(data))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    found = content.get("format_version") if isinstance(content, dict) else None
    if found != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {found!r}, expected {FORMAT_VERSION}: prepare the data "
            "again with this version of sdn"
        )
    if content.pop("sha256", None) != _sha256(content) or _text(content) != data:
        raise ValueError(f"{where} is damaged: its content does not match its own SHA-256")
    return _from_json(content)


def _text(content: dict[str, Any]) -> bytes:
    """The bytes of a manifest's file; there is one way only to write the same content."""
    whole = content | {"sha256": _sha256(content)}
    return (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode()


def _to_json(manifest: Manifest) -> dict[str, Any]:
    content = dataclasses.asdict(manifest)
    del content["_samples"]
    return {"format_version": FORMAT_VERSION, **content}


def _from_json(content: dict[str, Any]) -> Manifest:
    values = {key: content[key] for key in content if key != "format_version"}
    values["dead_letter_file"] = FileRef(**values["dead_letter_file"])
    segments = []
    for segment in values["segments"]:
        table = None if segment["table"] is None else FileRef(**segment["table"])
        segments.append(Segment(**(segment | {"table": table})))
    values["segments"] = tuple(segments)
    return Manifest(**values)


def _sha256(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

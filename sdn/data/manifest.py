"""The manifest: what a data set consists of. Written last, so a folder with one is complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdn.data.files import LocalFolder
from sdn.data.records import SPLITS

if TYPE_CHECKING:
    from pathlib import Path

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DEAD_LETTERS = "dead-letters.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar with its index."""

    name: str
    bytes: int
    sha256: str
    samples: int
    index_name: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One version of a data set."""

    preparation: dict[str, Any]
    """What the samples depend on: source, resolution, fit, image_format, shard_samples, ..."""
    splits: dict[str, tuple[Shard, ...]]
    """Every name of `SPLITS` -> its shards."""
    exclusions: dict[str, int]
    """Reason -> how many the source left out by its own rule."""
    dead_letters: int
    """How many could not be used; `dead-letters.jsonl` has key, where and reason of each."""
    attribution: str | None
    """Whom to name beside images that come from this data."""

    @property
    def digest(self) -> str:
        """SHA-256 of the content, the same wherever the data set lies.

        The index files count for nothing in it: they follow from the shards, and their bytes
        change with the version of pyarrow.
        """
        content = _to_json(self)
        for shards in content["splits"].values():
            for shard in shards:
                for field in ("index_name", "index_bytes", "index_sha256"):
                    del shard[field]
        return _sha256(content)

    @property
    def resolution(self) -> int:
        """Height and width of the images in pixels."""
        return int(self.preparation["resolution"])

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split, in order.

        Raises:
            ValueError: an unknown split.
        """
        if split not in self.splits:
            raise ValueError(f"no split {split!r}; there are: {', '.join(self.splits)}")
        return self.splits[split]

    def shard_samples(self, split: str) -> tuple[int, ...]:
        """Samples of each shard of a split: what a `Plan` is made from."""
        return tuple(shard.samples for shard in self.shards(split))

    def samples(self, split: str) -> int:
        """Samples of a split."""
        return sum(self.shard_samples(split))


def load_manifest(folder: Path | str) -> Manifest:
    """The manifest of the data set in `folder`.

    Raises:
        ValueError: no manifest, one that is damaged, or one of another format version.
    """
    return read_manifest(LocalFolder(folder))


def read_manifest(files: LocalFolder) -> Manifest:
    """As `load_manifest`."""
    where = files.path / MANIFEST
    if not files.exists(MANIFEST):
        raise ValueError(
            f"{files.path} holds no data set: {MANIFEST} is missing (it is written last, so a "
            "preparation that was cut off has none; prepare the data again)"
        )
    try:
        content = json.loads(files.read(MANIFEST))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    found = content.get("format_version") if isinstance(content, dict) else None
    if found != FORMAT_VERSION:
        raise ValueError(f"{where} has format version {found!r}, expected {FORMAT_VERSION}")
    if content.pop("sha256", None) != _sha256(content):
        raise ValueError(f"{where} is damaged: its content does not match its own SHA-256")
    return _from_json(content)


def write_manifest(files: LocalFolder, manifest: Manifest) -> None:
    """Write the manifest atomically; from then on the folder is a data set."""
    content = _to_json(manifest)
    content["sha256"] = _sha256(content)
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    files.write(MANIFEST, text.encode())


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}


def _from_json(content: dict[str, Any]) -> Manifest:
    splits = {name: tuple(Shard(**s) for s in content["splits"][name]) for name in SPLITS}
    others = {key: content[key] for key in content if key not in ("format_version", "splits")}
    return Manifest(splits=splits, **others)


def _sha256(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

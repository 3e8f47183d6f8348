"""A data set in shards, written without the code that prepares data."""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
import zlib
from dataclasses import dataclass, field

from sdn.data.files import LocalFolder
from sdn.data.index import IndexRow, to_parquet
from sdn.data.manifest import FileRef, Manifest, Shard, make_segment, write_manifest


@dataclass(frozen=True)
class Item:
    """A sample as it is to be written."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    labels: dict[str, str] = field(default_factory=dict)


def member(name, data):
    """A tar member: header, data, padding."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def span_of(item):
    """A sample's bytes, and where image and JSON lie in them."""
    extension = "jpg" if item.image.startswith(b"\xff\xd8") else "png"
    about = json.dumps({"captions": item.captions, "labels": item.labels}).encode()
    image = member(f"{item.key}.{extension}", item.image)
    rest = member(f"{item.key}.json", about) + member(f"{item.key}.txt", item.captions[0].encode())
    where = {
        "image_offset": 512,
        "image_length": len(item.image),
        "json_offset": len(image) + 512,
        "json_length": len(about),
    }
    return image + rest, where


def write_shard(files, name, items):
    """One tar with its index."""
    rows, spans, offset = [], [], 0
    for item in items:
        span, where = span_of(item)
        crc32 = zlib.crc32(span)
        rows.append(IndexRow(item.key, offset, len(span), crc32, **where))
        spans.append(span)
        offset += len(span)
    tar = b"".join(spans)
    tar += bytes(1024 + -(len(tar) + 1024) % 10240)
    index = to_parquet(rows, name)
    files.write(name, tar)
    files.write(name.removesuffix(".tar") + ".parquet", index)
    return Shard(
        name=name,
        bytes=len(tar),
        sha256=hashlib.sha256(tar).hexdigest(),
        samples=len(rows),
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def write_shards(files, split, items, shard_samples):
    """Shards of so many samples each, the last one with what is left; any iterable of items."""
    items = iter(items)
    for number in itertools.count():
        part = list(itertools.islice(items, shard_samples))
        if not part:
            return
        yield write_shard(files, f"{split}-{number:05d}.tar", part)


def finish(files, segments, resolution):
    """The manifest of a first version; what makes the shards a data set."""
    files.write("dead-letters-0.jsonl", b"")
    manifest = Manifest(
        number=1,
        parent=None,
        preparation={"source": "test", "resolution": resolution, "image_format": "any"},
        segments=tuple(segments),
        exclusions={},
        duplicates={},
        dead_letters=0,
        dead_letter_file=FileRef(
            name="dead-letters-0.jsonl", bytes=0, sha256=hashlib.sha256(b"").hexdigest()
        ),
        attribution=None,
    )
    write_manifest(files, manifest)
    return manifest


def write_dataset(folder, splits, *, shard_samples=5, resolution=32):
    """A data set of split -> items in a local folder."""
    files = LocalFolder(folder)
    segments = []
    for split, items in splits.items():
        shards = list(write_shards(files, split, items, shard_samples))
        segments.append(make_segment(files, split, shards, len(shards)))
    return finish(files, segments, resolution)

"""Sources and data sets on a real S3 server: the same as on disk."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.s3_files import S3Files
from sdn.config import DataConfig
from sdn.data.claims import undo
from sdn.data.dataset import open_dataset
from sdn.data.files import LocalFolder
from sdn.data.images import encode
from sdn.data.loader import batches
from sdn.data.plan import Plan
from sdn.data.shards import Writing, append_dataset, write_dataset
from sdn.data.sources import partitions, read_source
from sdn.data.sources.fingerprint import fingerprint
from sdn.data.verification import verify

CONFIG = {"resolution": 32, "shard_samples": 10, "failure_budget": 0.5}


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    return encode(pixels, "png")


def make_folder(folder: Path, count: int = 12) -> None:
    folder.mkdir()
    rows = [("file_name", "caption")]
    for number in range(count):
        (folder / f"p{number}.png").write_bytes(picture(number))
        if number % 2:
            (folder / f"p{number}.txt").write_text(f"picture {number}")
        else:
            rows.append((f"p{number}.png", f"picture {number}"))
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "torn.png").write_bytes(picture(99)[:99])
    (folder / "torn.txt").write_text("torn")


def make_parquet(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir()
    for name, first in (("train-00000-of-00001", 0), ("test-00000-of-00001", 20)):
        images = [{"bytes": picture(n), "path": f"{n}.png"} for n in range(first, first + 9)]
        captions = [f"picture {n}" for n in range(first, first + 9)]
        table = pa.table({"image": images, "caption": captions})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=4)


def make_tars(folder: Path) -> None:
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for sample in range(number * 8, number * 8 + 8):
                for name, data in (("png", picture(sample)), ("txt", f"picture {sample}".encode())):
                    info = tarfile.TarInfo(f"{sample:04d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


MAKERS = {"folder": make_folder, "parquet": make_parquet, "tars": make_tars}


def upload(folder: Path, files: S3Files) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            files.write(path.relative_to(folder).as_posix(), path.read_bytes())


@pytest.mark.parametrize("source", MAKERS)
def test_a_source_in_a_bucket_gives_what_it_gives_on_disk(user, tmp_path, source):
    """The same items in the same order, records and dead letters alike."""
    folder = tmp_path / "source"
    MAKERS[source](folder)
    files = S3Files(f"s3://data/sources/{source}", endpoint=user.endpoint)
    upload(folder, files)
    local = DataConfig(source=source, path=str(folder), **CONFIG)
    remote = DataConfig(source=source, path=files.uri, **CONFIG)
    found = list(read_source(remote, files))
    assert found == list(read_source(local))
    assert len(found) >= 12
    before = fingerprint(remote, files)
    files.write("one-more.txt", b"x")
    assert fingerprint(remote, files) != before


def test_a_data_set_lives_in_a_bucket(user, tmp_path):
    """Written, appended to, undone and verified there; every byte as on disk."""
    folder = tmp_path / "source"
    make_folder(folder)
    config = DataConfig(source="folder", path=str(folder), **CONFIG)
    there = S3Files("s3://data/life", endpoint=user.endpoint, cache=tmp_path / "cache")
    here = LocalFolder(tmp_path / "here")

    def everywhere(write):
        for files in (there, here):
            write(partitions(config), files, Writing(config=config))

    def same():
        names = {info.name for info in here.walk()}
        assert {info.name for info in there.walk()} == names
        assert all(there.read(name) == here.read(name) for name in names)

    everywhere(write_dataset)
    same()
    for number in range(30, 40):
        (folder / f"p{number}.png").write_bytes(picture(number))
        (folder / f"p{number}.txt").write_text(f"picture {number}")
    everywhere(append_dataset)
    same()
    assert verify(there) == []
    undo(there)
    undo(here)
    same()
    assert verify(there) == []
    there.close()


def test_a_damaged_cache_costs_a_second_look(user, tmp_path):
    """Blocks that changed in the cache are read again from the server: no sample is wrong."""
    folder = tmp_path / "source"
    make_folder(folder, 40)
    config = DataConfig(source="folder", path=str(folder), **CONFIG)
    write_dataset(partitions(config), LocalFolder(tmp_path / "here"), Writing(config=config))
    there = S3Files("s3://data/damaged", endpoint=user.endpoint, cache=tmp_path / "cache")
    upload(tmp_path / "here", there)

    def epoch(place):
        dataset = open_dataset(place)
        plan = Plan(shard_samples=dataset.shards("train").samples, seed=0, global_batch=6)
        run = batches(dataset, "train", plan=plan, seed=0, steps=plan.steps_per_epoch, cache_gib=0)
        return [(batch.keys, batch.captions, batch.pixels.clone()) for batch in run]

    expected = epoch(tmp_path / "here")
    for _ in range(2):  # from the server, then through damaged blocks
        found = epoch(there)
        assert [(keys, captions) for keys, captions, _ in found] == [
            (keys, captions) for keys, captions, _ in expected
        ]
        assert all(torch.equal(a[2], b[2]) for a, b in zip(found, expected, strict=True))
        blocks = list((tmp_path / "cache").glob("blocks/*/*"))
        assert blocks
        for block in blocks:
            data = bytearray(block.read_bytes())
            for place in range(700, len(data), 3000):
                data[place] ^= 0x10
            block.write_bytes(bytes(data))
    there.close()

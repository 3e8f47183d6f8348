"""What many images need, from what few do: `python tests/benchmarks/capacity.py [--json]`.

Counts the S3 requests of preparing a data set into a bucket and of an epoch read from it, the bytes
of shards and indexes, the bytes of the catalogue that decides what goes where, and its rows a
second of one core. With the rates of `sharding.py`, `loader.py` and `train_step.py`,
given as options, it extrapolates in proportion to 10 million and 1 billion images. What does not
grow in proportion is said in `infra/CAPACITY.md`, where its figures are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from sharding import make_source  # noqa: E402

SIZES = (10_000_000, 1_000_000_000)
SHARD = 1000
"""Samples a shard, as in `sharding.py`."""


@contextmanager
def counted():
    """Counts the requests that all S3 clients made inside send, by operation."""
    from pipelines import s3_files

    plain, counts = s3_files.make_client, Counter()

    def count(event_name: str, **_: object) -> None:
        counts[event_name.rpartition(".")[2]] += 1

    def make_client(*args: object, **options: object):
        client = plain(*args, **options)
        client.meta.events.register("before-send.s3", count)
        return client

    with mock.patch.object(s3_files, "make_client", make_client):
        yield counts


def requests(images: int) -> dict[str, object]:
    """Requests and bytes of preparing so many images, and of an epoch with an empty cache."""
    import s3_server

    from pipelines.s3_files import S3Files
    from sdn.config import DataConfig
    from sdn.data.dataset import open_dataset
    from sdn.data.loader import batches
    from sdn.data.plan import Plan
    from sdn.data.shards import Writing, write_dataset
    from sdn.data.sources import partitions

    with tempfile.TemporaryDirectory(prefix="sdn-capacity-") as temporary:
        here = Path(temporary)
        make_source(here / "source", images)
        config = DataConfig(
            source="tars",
            path=str(here / "source"),
            image_format="jpg",
            fit="crop",
            shard_samples=SHARD,
        )
        (here / "s3").mkdir()
        with s3_server.running(here / "s3") as server:
            os.environ.update(server.keys())
            place = S3Files("s3://data/set", endpoint=server.endpoint, cache=here / "cache")
            with counted() as writing:
                write_dataset(partitions(config), place, Writing(config=config))
            sizes = Counter()
            for info in place.walk():
                sizes[info.name.rpartition(".")[2]] += info.size
            again = S3Files("s3://data/set", endpoint=server.endpoint, cache=here / "cache-2")
            with counted() as reading:
                shards = open_dataset(again).shards("train")
                plan = Plan(shard_samples=shards.samples, seed=0, global_batch=256)
                steps = plan.steps_per_epoch
                for _ in batches(again, "train", plan=plan, seed=0, steps=steps, workers=1):
                    pass
        return {
            "images": images,
            "train_images": plan.samples,
            "writing": dict(writing),
            "reading": dict(reading),
            "bytes": dict(sizes),
        }


def catalogue(rows: int) -> dict[str, float]:
    """How fast so many samples go through the catalogue, and what they take on disk."""
    from sdn.data.catalog import Catalog
    from sdn.data.index import IndexRow

    def row(number: int) -> tuple[IndexRow, str]:
        def digest(what: str, length: int) -> bytes:
            return hashlib.sha256(f"{what}{number}".encode()).digest()[:length]

        lengths = {"content": 16, "pixels": 16, "near": 8, "words": 8}
        values = {name: digest(name, length) for name, length in lengths.items()}
        return _row(IndexRow, number, values), "train"

    catalog = Catalog()
    made = [row(number) for number in range(rows)]
    began = time.process_time()  # of the processor: others on the machine change it little
    for start in range(0, rows, 1000):
        catalog.add(start // 1000, made[start : start + 1000])
    catalog.keep_keys_unique()
    catalog.count_duplicates()
    for _ in catalog.in_shards("train", SHARD):
        pass
    seconds = time.process_time() - began
    size = (Path(catalog._folder.name) / "catalog.sqlite").stat().st_size
    catalog.close()
    return {"rows": rows, "rows_per_s": rows / seconds, "bytes_a_row": size / rows}


def _row(kind: type, number: int, values: dict[str, bytes]):
    """An index row with made-up places."""
    import dataclasses

    filled = {}
    for field in dataclasses.fields(kind):
        if field.name in values:
            filled[field.name] = values[field.name]
        elif field.name == "key":
            filled["key"] = f"{number:012d}"
        else:
            filled[field.name] = number if "int" in str(field.type) else ""
    return kind(**filled)


def extrapolated(found: dict[str, object], rates: argparse.Namespace) -> list[tuple[str, ...]]:
    """Rows of the note's table: what, and its value at each size."""
    few, many = found["requests"]
    more = many["images"] - few["images"]

    def each(what: str, of: str) -> float:
        """Requests an image, the fixed ones left out."""
        total = [
            sum(one[what].values()) if of == "all" else one[what].get(of, 0) for one in (few, many)
        ]
        return (total[1] - total[0]) / more

    def size_of(kind: str) -> float:
        return (many["bytes"].get(kind, 0) - few["bytes"].get(kind, 0)) / more

    kept = found["catalogue"]
    hour, gb = 3600, 1e9
    lines = {
        "shards of 1,000": lambda n: n / SHARD,
        "shards, GB": lambda n: n * size_of("tar") / gb,
        "indexes, GB": lambda n: n * size_of("parquet") / gb,
        "preparing: core hours": lambda n: n / rates.sharding / hour,
        "preparing: millions of GET": lambda n: n * each("writing", "GetObject") / 1e6,
        "preparing: millions of other requests": lambda n: (
            n * (each("writing", "all") - each("writing", "GetObject")) / 1e6
        ),
        "catalogue, GB on one disk": lambda n: n * kept["bytes_a_row"] / gb,
        "catalogue: hours of one core": lambda n: n / kept["rows_per_s"] / hour,
        "an epoch: millions of GET": lambda n: n * each("reading", "all") / 1e6,
        "an epoch: core hours of loading": lambda n: n / rates.loader / hour,
        "an epoch of stage two: hours of this machine": lambda n: n / rates.train / hour,
    }
    return [(what, *(f"{value(size):,.3g}" for size in SIZES)) for what, value in lines.items()]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--images", type=int, nargs=2, default=(2000, 6000))
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--sharding", type=float, help="images/s a core, of sharding.py")
    parser.add_argument("--loader", type=float, help="images/s a core, of loader.py")
    parser.add_argument("--train", type=float, help="images/s, of train_step.py")
    options = parser.parse_args()
    found = {
        "requests": [requests(number) for number in options.images],
        "catalogue": catalogue(options.rows),
    }
    for one in found["requests"]:
        print(json.dumps(one))
    print(json.dumps(found["catalogue"]))
    if None not in (options.sharding, options.loader, options.train):
        found["table"] = extrapolated(found, options)
        print("| | 10 M images | 1 B images |\n|---|---:|---:|")
        for line in found["table"]:
            print(f"| {' | '.join(line)} |")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Seconds and memory until a rank knows its batch: `python tests/benchmarks/planning.py [--json]`.

A manifest of a million shards is written, without the shards; then a fresh process opens it, makes
the plan and asks for the first batch and for one in the middle of the third epoch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

SIDE, BATCH, WORLD = 64, 3072, 48


def shards(count: int, samples: int):
    """Shards as the manifest describes them, with digests of their own."""
    from sdn.data.manifest import Shard

    for number in range(count):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        yield Shard(
            name=f"train-{number:06d}.tar",
            bytes=6_000_000 + number,
            sha256=digest,
            samples=samples,
            index_bytes=60_000 + number % 1000,
            index_sha256=digest[::-1],
        )


def build(folder: str, count: int, samples: int) -> None:
    """A manifest without its shards."""
    from shard_builder import LocalFolder, finish, make_segment

    files = LocalFolder(folder)
    finish(files, [make_segment(files, "train", shards(count, samples), count)], SIDE)


def measure(folder: str) -> dict[str, object]:
    """What a fresh process needs; importing is part of it."""
    began = time.perf_counter()
    from sdn.data.dataset import open_dataset
    from sdn.data.plan import Plan

    table = open_dataset(folder).shards("train")
    opened = time.perf_counter() - began
    plan = Plan(shard_samples=table.samples, seed=0, global_batch=BATCH)
    first = plan.samples_of(0, 0, WORLD)
    names = [table[shard].name for shard in first.shards[:1].tolist()]
    known = time.perf_counter() - began
    each = {}
    steps = {"first": 0, "middle of epoch 3": int(2.5 * plan.steps_per_epoch)}
    for what, step in steps.items():
        for rank in (0, 1, WORLD // 2, WORLD - 1):
            start = time.perf_counter()
            plan.samples_of(step, rank, WORLD)
            each[f"{what}, rank {rank}"] = time.perf_counter() - start
    assert "torch" not in sys.modules
    assert len(names) == 1
    return {
        "first_batch_s": known,
        "open_s": opened,
        "batch_s": each,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "samples": plan.samples,
        "shards": len(table),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=1000, help="of each shard")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="sdn-planning-") as folder:
        build(folder, options.shards, options.samples)
        command = [sys.executable, __file__, "--measure", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    if options.json:
        print(done.stdout.splitlines()[-1])
        return
    for name, value in json.loads(done.stdout.splitlines()[-1]).items():
        print(f"{name:16} {value}")


if __name__ == "__main__":
    main()

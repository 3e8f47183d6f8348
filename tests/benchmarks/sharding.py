"""How fast captioned photos become shards, on one core and on two, and with how much memory.

    python tests/benchmarks/sharding.py [--json] [--images 4000]

The source is made first: JPEG photos of 160 x 120 pixels with a caption each, in tars of 250, all
different. They become 64 px JPEG. Each figure comes from a process of its own, pinned to its cores,
Ray and its workers running before the clock starts. `one_core` is everything on one core: once
without Ray and once with; the ratio takes the better of the two. Memory is the peak of what driver
and workers have for themselves (USS), Ray's own daemons left out, sampled every 50 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

import numpy as np

SIZE = (120, 160)
TAR = 250
"""Images a tar: a partition of the source, as large as those that folders are cut into."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--images", type=int, default=4000, help="ten times that for memory, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return
    cores = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder) / "few", Path(folder) / "many"
        make_source(few, given.images)
        make_source(many, 10 * given.images)
        rates = {"one_core_without_ray": ("here", cores[:1]), "one_core": ("1", cores[:1])}
        rates["two_cores"] = ("2", cores)
        # Taking turns, the best of each: whatever else runs on the machine only slows them down.
        passes = [{n: run(few, *how) for n, how in rates.items()} for _ in range(given.repeats)]
        best = {
            name: max((found[name] for found in passes), key=lambda found: found["images_per_s"])
            for name in rates
        }
        runs = best | {
            "memory": run(few, "2", cores, watch="memory"),
            "memory_tenfold": run(many, "2", cores, watch="memory"),
        }
    one = max(runs["one_core"]["images_per_s"], runs["one_core_without_ray"]["images_per_s"])
    found = {
        "runs": runs,
        "ratio_two_cores": round(runs["two_cores"]["images_per_s"] / one, 2),
        "ratio_memory_tenfold": round(
            runs["memory_tenfold"]["peak_mib"] / runs["memory"]["peak_mib"], 3
        ),
    }
    for name, values in runs.items():
        print(name, values)
    print(f"two cores over one: {found['ratio_two_cores']}")
    print(f"memory at ten times the images: {found['ratio_memory_tenfold']}")
    if given.json:
        print(json.dumps(found))


def make_source(folder: Path, images: int) -> None:
    """Tars of photo-like images, no two alike."""
    from PIL import Image

    folder.mkdir()
    draw = np.random.default_rng(0)
    for first in range(0, images, TAR):
        with tarfile.open(folder / f"train-{first // TAR:05d}.tar", "w") as tar:
            for number in range(first, min(first + TAR, images)):
                coarse = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC)
                noise = draw.integers(0, 24, (*SIZE, 3), dtype=np.uint8)
                pixels = np.asarray(image) // 2 + noise
                buffer = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
                add(tar, f"{number:07d}.jpg", buffer.getvalue())
                add(tar, f"{number:07d}.txt", f"picture number {number}".encode())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def run(source: Path, workers: str, cores: list[int], watch: str = "rate") -> dict[str, float]:
    """One measurement in a process of its own, pinned to these cores."""
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(source), out, workers, watch],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"SDN_CPUS": str(len(cores)), "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(source: str, out: str, workers: str, watch: str) -> dict[str, float]:
    """Prepare the whole source: its rate or, watched, which slows it down, its peak memory."""
    from pipelines.cluster import stop_ray
    from pipelines.preparing import on_ray
    from pipelines.settings import Settings
    from sdn.config import DataConfig
    from sdn.data.files import LocalFolder
    from sdn.data.shards import Writing, run_here, write_dataset
    from sdn.data.sources import partitions

    runner = run_here if workers == "here" else on_ray(Settings())
    config = DataConfig(
        source="tars", path=source, image_format="jpg", fit="crop", shard_samples=1000
    )
    list(runner(warm_up, [config] * 4 * (1 if workers == "here" else int(workers))))
    read = sum(path.stat().st_size for path in Path(source).iterdir())
    memory = Memory()
    with memory if watch == "memory" else contextlib.nullcontext():
        began = time.perf_counter()
        files = LocalFolder(Path(out) / "data")
        made = write_dataset(partitions(config), files, Writing(config=config, run=runner))
        seconds = time.perf_counter() - began
    stop_ray()
    images = sum(made.counts.values())
    if watch == "memory":
        return {"images": images, "peak_mib": round(memory.peak / 2**20, 1)}
    return {
        "images": images,
        "images_per_s": round(images / seconds, 1),
        "read_mb_per_s": round(read / seconds / 1e6, 1),
    }


def warm_up(config: object) -> int:
    """Have a worker import what it needs, and decode a few images."""
    import itertools

    from sdn.data.preparation import prepare
    from sdn.data.sources import read_source

    return len([prepare(item, config) for item in itertools.islice(read_source(config), 300)])


class Memory:
    """Peak of the memory that this process and Ray's workers have for themselves."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        here = psutil.Process()
        while not self._over.wait(0.05):
            total = here.memory_full_info().uss
            for child in here.children(recursive=True):
                try:
                    if child.name().startswith("ray::"):
                        total += child.memory_full_info().uss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)


if __name__ == "__main__":
    main()

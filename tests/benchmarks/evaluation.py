"""Images a second of one set of an evaluation: drawing, features, scores against real; memory.

    python tests/benchmarks/evaluation.py [--images 10000] [--size 224] [--threads 2] [--json]

A quarter-width student at 64 px draws, untrained: a picture costs the same whatever it shows.
Scored are KID, FID with its interval, precision, recall, diversity and Inception Score; retrieval
and caption match, which depend on the data set, are left out.
Each size is a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sdn.captions import new_encoder
from sdn.evaluation import synthesizer_of
from sdn.features.networks import Lite0
from sdn.features.rows import RowWriter
from sdn.recipes import recipe
from sdn.scores.inception import InceptionScore
from sdn.scores.sets import score_sets

BATCH = 64


def measured(images: int, size: int) -> dict[str, float]:
    config = recipe("openmoji")
    model = synthesizer_of(config, new_encoder(config.captions), None)
    network = Lite0(size)
    seconds = dict.fromkeys(("drawing", "features", "scores"), 0.0)
    inception = InceptionScore(images, network.classes)
    with tempfile.TemporaryDirectory() as folder:
        with RowWriter(Path(folder, "fake")) as fake, RowWriter(Path(folder, "real")) as real:
            for start in range(0, images, BATCH):
                captions = [
                    f"picture {n} of many" for n in range(start, min(start + BATCH, images))
                ]
                began = time.perf_counter()
                pixels = model.of_data(captions)
                drawn = time.perf_counter()
                features, logits = network(pixels)
                fake.write(features)
                inception.update(logits)
                seconds["drawing"] += drawn - began
                seconds["features"] += time.perf_counter() - drawn
                real.write(features + 0.1 * torch.randn_like(features))
                if start % (BATCH * 20) == 0:
                    print(f"{start} of {images} images", file=sys.stderr, flush=True)
        began = time.perf_counter()
        score_sets(real.rows(), fake.rows())
        inception.score()
        seconds["scores"] = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "images": images,
        **{f"{name}_s": round(value, 1) for name, value in seconds.items()},
        "all_s": round(sum(seconds.values()), 1),
        "images_per_s": round(images / sum(seconds.values()), 1),
        "peak_mib": round(peak),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.one:
        print(json.dumps(measured(chosen.images, chosen.size)))
        return
    found = []
    for images in (max(BATCH, chosen.images // 4), chosen.images):
        place = ["--images", str(images), "--size", str(chosen.size)]
        command = [sys.executable, __file__, "--one", *place, "--threads", str(chosen.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    if chosen.json:
        print(json.dumps(found))
        return
    for one in found:
        print("  ".join(f"{name} {value}" for name, value in one.items()))


if __name__ == "__main__":
    main()

"""Images a second of a training step: `python tests/benchmarks/train_step.py [--json]`.

Random images and embeddings, one process, no loader: what the networks and the optimizer cost.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from sdn.data.records import Batch
from sdn.recipes import RECIPES, recipe
from sdn.stage_run import new_student
from sdn.teacher import channels_last, empty_teacher
from sdn.training import Trainer


def images_per_second(name: str, stage: str, precision: str, batch: int, steps: int) -> float:
    """Mean rate over `steps` steps after three that warm up."""
    config = recipe(name)
    teacher = channels_last(empty_teacher(config.teacher))
    trainer = Trainer(
        stage,
        new_student(config),
        teacher,
        getattr(config, stage),
        steps=steps + 3,
        tap_means=dict.fromkeys(teacher.names, 1.0),
        precision=precision,
    )
    side = config.data.resolution
    images = Batch(
        keys=("",) * batch,
        pixels=torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8),
        captions=("",) * batch,
        labels=({},) * batch,
        epoch=0,
        step=0,
        weight=1.0,
    )
    text = torch.randn(batch, config.captions.dim)
    for done in range(steps + 3):
        if done == 3:
            began = time.perf_counter()
        trainer.advance(images, text, batch)
    return steps * batch / (time.perf_counter() - began)


def main() -> None:
    """Print a line a stage, precision and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--recipe", default="openmoji", choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32])
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = []
    for stage in ("stage_one", "stage_two"):
        for precision in ("float32", "bf16"):
            for batch in chosen.batch:
                rate = images_per_second(chosen.recipe, stage, precision, batch, chosen.steps)
                rows.append(
                    {"stage": stage, "precision": precision, "batch": batch, "images_per_s": rate}
                )
                text = f"{stage} {precision} batch {batch}: {rate:.0f} images/s"
                print(text, file=sys.stderr if chosen.json else sys.stdout)
    if chosen.json:
        print(json.dumps({"recipe": chosen.recipe, "threads": chosen.threads, "rows": rows}))


if __name__ == "__main__":
    main()

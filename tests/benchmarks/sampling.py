"""Images a second of a student: `python tests/benchmarks/sampling.py [--model FOLDER] [--json]`.

The student alone, in batches, on each device there is: plain float32, bf16, compiled. Weights do
not change the rate, so without a model those of a recipe are drawn. With one, also what
`sdn generate` does: 64 captions, each encoded and drawn by itself by one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdn.compiling import compiled
from sdn.recipes import RECIPES, recipe
from sdn.sampling import open_synthesizer
from sdn.stage_run import new_student
from sdn.teacher import channels_last

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdn.student import Student

CAPTIONS = 64
ROUNDS = 5
SECONDS = 1.0


def seconds_a_call(call: Callable[[], object], device: torch.device) -> float:
    """Median over rounds, after two calls that warm up (and compile)."""

    def waited() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(2):
        call()
    began = waited()
    call()
    calls = max(1, round(SECONDS / max(waited() - began, 1e-6)))
    found = []
    for _ in range(ROUNDS):
        began = waited()
        for _ in range(calls):
            call()
        found.append((waited() - began) / calls)
    return statistics.median(found)


def rates(student: Student, batch: int, device: torch.device) -> dict[str, float]:
    """Way of computing -> images a second."""
    student = channels_last(student.to(device)).eval()
    code = torch.randn(batch, student.text_dim + student.noise, device=device)

    def plain(given: torch.Tensor) -> torch.Tensor:
        return student(given)["image"]

    ways = {"float32": (plain, False), "bf16": (plain, True)}
    for name, half in (("float32, compiled", False), ("bf16, compiled", True)):
        ways[name] = (compiled(plain, "on", device), half)
    found = {}
    for name, (way, half) in ways.items():

        def call(way: Callable[..., object] = way, *, half: bool = half) -> object:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
                return way(code)

        found[name] = batch / seconds_a_call(call, device)
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a finished stage of a store")
    parser.add_argument("--recipe", choices=[*RECIPES], default="openmoji")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = None if given.model is None else open_synthesizer(given.model)
    student = new_student(recipe(given.recipe)) if model is None else model.student
    found: dict[str, object] = {"parameters": sum(p.numel() for p in student.parameters())}
    if model is not None:
        captions = [f"a picture of number {n}" for n in range(CAPTIONS)]
        one = seconds_a_call(lambda: model(captions), torch.device("cpu"))
        found[f"{CAPTIONS} captions, s"] = one
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    for device in devices:
        for batch in map(int, given.batches.split(",")):
            for way, rate in rates(student, batch, device).items():
                found[f"{device.type}, batch {batch}, {way}, images/s"] = rate
                if not given.json:
                    print(f"{device.type:>4}  batch {batch:>3}  {way:<18} {rate:>10,.0f} images/s")
    if given.json:
        print(json.dumps(found))
    else:
        print({name: value for name, value in found.items() if "images/s" not in name})


if __name__ == "__main__":
    main()

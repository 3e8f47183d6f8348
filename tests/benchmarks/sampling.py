"""Images a second of a student: `python tests/benchmarks/sampling.py --recipe fashion64 --df-gan`.

The student alone, in batches, on each device there is: plain float32, bf16, compiled. Weights do
not change the rate, so without a model those of a recipe are drawn. With one, also what
`sdn generate` does: 64 captions, each encoded and drawn by itself by one thread. With `--df-gan`
also DF-GAN's generator at the same size, right after each of the student's, and the ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from df_gan import NOISE, TEXT, Generator

from sdn.compiling import compiled
from sdn.recipes import RECIPES, recipe
from sdn.sampling import open_synthesizer
from sdn.stage_run import new_student
from sdn.teacher import channels_last

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

CAPTIONS = 64
ROUNDS = 5
SECONDS = 1.0
WAYS = {
    "float32": (False, torch.float32),
    "bf16": (False, torch.bfloat16),
    "float32, compiled": (True, torch.float32),
    "bf16, compiled": (True, torch.bfloat16),
}
"""Name -> compiled, type of weights and activations (autocast would cast weights in each call)."""


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


def rate(network: nn.Module, size: int, batch: int, device: torch.device, way: str) -> float:
    """Images a second.

    Args:
        network: (batch, size) -> images, or a student's taps.
        size: numbers that an image is drawn from.
        batch: images at a time.
        device: where.
        way: one of WAYS.
    """
    compile_it, dtype = WAYS[way]
    network = channels_last(copy.deepcopy(network).to(device, dtype)).eval()
    code = torch.randn(batch, size, device=device, dtype=dtype)

    def plain(given: torch.Tensor) -> torch.Tensor:
        drawn = network(given)
        return drawn["image"] if isinstance(drawn, dict) else drawn

    draw = compiled(plain, "on", device) if compile_it else plain

    def call() -> object:
        with torch.inference_mode():
            return draw(code)

    return batch / seconds_a_call(call, device)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a finished stage of a store")
    parser.add_argument("--recipe", choices=[*RECIPES], default="openmoji")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--df-gan", action="store_true", help="measure DF-GAN's generator, too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = None if given.model is None else open_synthesizer(given.model)
    student = new_student(recipe(given.recipe)) if model is None else model.student
    size = student.text_dim + student.noise
    if given.df_gan:
        with torch.inference_mode():
            resolution = student(torch.zeros(1, size))["image"].shape[-1]
        df_gan = Generator(resolution)
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
            for way in WAYS:
                own = rate(student, size, batch, device, way)
                found[f"{device.type}, batch {batch}, {way}, images/s"] = own
                line = f"{device.type:>4}  batch {batch:>3}  {way:<18} {own:>10,.0f} images/s"
                if given.df_gan:
                    other = rate(df_gan, NOISE + TEXT, batch, device, way)
                    found[f"{device.type}, batch {batch}, {way}, DF-GAN, images/s"] = other
                    line += f"  DF-GAN {other:>8,.0f}  ratio {own / other:.1f}"
                if not given.json:
                    print(line, flush=True)
    if given.json:
        print(json.dumps(found))
    else:
        print({name: value for name, value in found.items() if "images/s" not in name})


if __name__ == "__main__":
    main()

"""A training step against a plain reference: `python tests/benchmarks/train_step.py [--json]`.

Random images and embeddings, no loader. Ours and the reference (see `reference_step.py`) take
turns, each in a process of its own, so that what else the machine does hits both; rates are
medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from reference_step import ReferenceStep

from sdn.config import LossWeights, StageConfig
from sdn.data.records import Batch
from sdn.memory import keep_freed_memory
from sdn.recipes import RECIPES, recipe
from sdn.stage_run import new_student
from sdn.teacher import channels_last, empty_teacher
from sdn.trainer import Trainer
from sdn.training import choose_precision, peak_memory_gib

if TYPE_CHECKING:
    from collections.abc import Callable

STAGES = ("stage_one", "stage_two")


@dataclass(frozen=True)
class Case:
    """What is measured."""

    recipe: str
    stage: str
    device: str
    batch: int
    threads: int
    precision: str


def inputs_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, 3, H, W) uint8 and embeddings (B, D)."""
    config, generator = recipe(case.recipe), torch.Generator().manual_seed(0)
    side = config.data.resolution
    pixels = torch.randint(0, 256, (case.batch, 3, side, side), generator=generator)
    text = torch.randn(case.batch, config.captions.dim, generator=generator)
    return pixels.to(torch.uint8).to(case.device), text.to(case.device)


def networks(case: Case) -> tuple[Any, Any]:
    """Student and teacher with weights under which signals neither grow nor die."""
    config = recipe(case.recipe)
    torch.manual_seed(0)
    teacher = empty_teacher(config.teacher)
    for conv in teacher.convs.values():
        torch.nn.init.kaiming_normal_(conv.weight)
    student = new_student(replace(config, student=replace(config.student, init="he")))
    return student.to(case.device), teacher.to(case.device)


def ours(case: Case) -> Callable[[], dict[str, torch.Tensor]]:
    """One step of the real trainer, all weights 1."""
    student, teacher = networks(case)
    trainer = Trainer(
        case.stage,
        student,
        channels_last(teacher),
        StageConfig(rate=1e-4, weights=LossWeights(), compile="auto"),
        steps=10**6,
        tap_means=dict.fromkeys(teacher.names, 1.0),
        precision=case.precision,
    )
    pixels, text = inputs_of(case)
    batch = Batch(
        keys=("",) * case.batch,
        pixels=pixels.contiguous(memory_format=torch.channels_last),
        captions=("",) * case.batch,
        labels=({},) * case.batch,
        epoch=0,
        step=0,
        weight=1.0,
    )
    return lambda: trainer.advance(batch, text, case.batch)[0]


def reference(case: Case) -> Callable[[], dict[str, torch.Tensor]]:
    """One step as the formula reads."""
    student, teacher = networks(case)
    step = ReferenceStep(case.stage, student, teacher, 1e-4)
    pixels, text = inputs_of(case)
    return lambda: step(text, pixels)


def waited(device: str) -> None:
    """Until the GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def rate(step: Callable[[], object], case: Case, steps: int) -> float:
    """Images a second over so many steps."""
    waited(case.device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    waited(case.device)
    return steps * case.batch / (time.perf_counter() - began)


class Turn:
    """A step that lives in a process of its own, with the memory settings it is trained with."""

    step: Callable[[], dict[str, torch.Tensor]]
    case: Case

    @classmethod
    def begin(cls, kind: str, case: Case) -> dict[str, float]:
        """Take the first two steps; returns the terms of the first."""
        torch.set_num_threads(case.threads)
        if kind == "ours":
            keep_freed_memory()
        cls.case, cls.step = case, staticmethod({"ours": ours, "reference": reference}[kind](case))
        first = {name: float(term) for name, term in cls.step().items()}
        cls.step()
        return first

    @classmethod
    def go_on(cls, steps: int) -> float:
        """Images a second over so many steps."""
        return rate(cls.step, cls.case, steps)

    @classmethod
    def peak(cls) -> float:
        """GiB that the process held at most."""
        return peak_memory_gib(torch.device(cls.case.device))


def compare(case: Case, rounds: int, steps: int) -> dict[str, Any]:
    """Rates and peaks of both, their ratio, and how far apart their first terms are."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as plain, spawn.Pool(1) as fast:
        expected = plain.apply(Turn.begin, ("reference", case))
        found = fast.apply(Turn.begin, ("ours", case))
        pairs = [
            (plain.apply(Turn.go_on, (steps,)), fast.apply(Turn.go_on, (steps,)))
            for _ in range(rounds)
        ]
        peaks = plain.apply(Turn.peak), fast.apply(Turn.peak)
    slow, quick = (statistics.median(values) for values in zip(*pairs, strict=True))
    return {
        "stage": case.stage,
        "batch": case.batch,
        "precision": case.precision,
        "reference_images_per_s": slow,
        "images_per_s": quick,
        "ratio": quick / slow,
        "ratios": [b / a for a, b in pairs],
        "reference_peak_gib": peaks[0],
        "ours_peak_gib": peaks[1],
        "largest_relative_difference": max(
            abs(found[name] - value) / abs(value) for name, value in expected.items()
        ),
    }


def products(case: Case) -> float:
    """GFLOP an image of the products that the method needs, without biases and activations.

    Student forward and backward (3 forwards' worth) and teacher of the real image; in stage two
    also teacher of the synthesis, forward and backward to its input.
    """
    student, teacher = networks(replace(case, device="cpu"))
    side = recipe(case.recipe).data.resolution
    found = dict.fromkeys(("student", "teacher"), 0.0)
    for name, network in (("student", student), ("teacher", teacher)):

        def count(module: Any, _: Any, out: torch.Tensor, name: str = name) -> None:
            found[name] += 2e-9 * module.weight.numel() * out[0, 0].numel()

        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(count)
    with torch.no_grad():
        student(torch.zeros(1, student.fc7.in_features))
        teacher(torch.zeros(1, 3, side, side))
    total = 3 * found["student"] + found["teacher"]
    return total + (2 * found["teacher"] if case.stage == "stage_two" else 0.0)


def product_rate() -> float:
    """TFLOP/s of an 8192 x 8192 x 8192 product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    waited("cuda")
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    waited("cuda")
    return 20 * 2 * 8192**3 / (time.perf_counter() - began) / 1e12


def blocks(case: Case) -> dict[str, float]:
    """Milliseconds a step on the GPU of each kind of kernel, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    step = ours(case)
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            step()
        waited("cuda")
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    return {row.key: row.self_device_time_total / 5000 for row in rows[:15]}


def main() -> None:
    """Print a line for each stage and batch, and JSON as the last line if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--recipe", default="openmoji", choices=list(RECIPES))
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "float32"])
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="a round")
    chosen = parser.parse_args()
    out = sys.stderr if chosen.json else sys.stdout
    precision = choose_precision(chosen.precision, torch.device(chosen.device))
    rows = []
    matrix = product_rate() if chosen.device == "cuda" else None
    for stage in STAGES if chosen.stage is None else (chosen.stage,):
        for batch in chosen.batch:
            case = Case(chosen.recipe, stage, chosen.device, batch, chosen.threads, precision)
            row = compare(case, chosen.rounds, chosen.steps)
            row["gflop_per_image"] = products(case)
            row["tflops"] = row["images_per_s"] * row["gflop_per_image"] / 1e3
            if matrix is not None:
                row |= {"share_of_product": row["tflops"] / matrix, "kernels_ms": blocks(case)}
            rows.append(row)
            print(
                f"{stage} batch {batch} {precision}: {row['images_per_s']:.0f} images/s, reference "
                f"{row['reference_images_per_s']:.0f}, ratio {row['ratio']:.2f}; peak "
                f"{row['ours_peak_gib']:.2f} and {row['reference_peak_gib']:.2f} GiB; "
                f"{row['tflops']:.2f} TFLOP/s"
                + (f", {row['share_of_product']:.0%} of the product's" if matrix else "")
                + f"; terms differ by at most {row['largest_relative_difference']:.2%}",
                file=out,
            )
    if chosen.json:
        print(json.dumps({"recipe": chosen.recipe, "product_tflops": matrix, "rows": rows}))


if __name__ == "__main__":
    main()

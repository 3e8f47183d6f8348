"""How fast a stage would train here, and what it would need: measured on made-up data."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from sdn.caption_fitting import caption_batches, new_caption_fit
from sdn.data.records import Batch
from sdn.memory import keep_freed_memory
from sdn.ranks import Rank
from sdn.stage_run import new_student, new_trainer
from sdn.teacher import channels_last, empty_teacher
from sdn.teacher_fitting import Targets, new_teacher_fit, teacher_batches
from sdn.training import choose_precision, peak_memory_gib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdn.config import RunConfig
    from sdn.stages import StageName

STAGES = ("teacher", "captions", "stage_one", "stage_two", "stage_three")
_CLASSES, _FEATURES = 50, 1000
"""Of the made-up data; the networks' cost hardly depends on them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A stage's training step on this machine."""

    images_per_s: float
    """Of one worker."""
    batch: int
    """Images a step it was measured with: this worker's share, or fewer where that is too slow."""
    memory_gib: float
    """Peak of the worker's process, or of its GPU."""
    parameters: int
    """Numbers that are trained."""
    checkpoint_bytes: int
    """Of one checkpoint."""
    precision: str


def measure(
    config: RunConfig,
    stage: str,
    *,
    device: torch.device,
    threads: int,
    workers: int = 1,
    seconds: float = 15.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Time some steps of a stage with random weights, images and captions.

    Args:
        config: of the run.
        stage: one of `STAGES`.
        device: to compute on.
        threads: CPU threads.
        workers: ranks that would share the batch.
        seconds: to spend; the first step is done in any case.
        clock: seconds.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    batch = max(1, _batch(config, stage) // workers)
    until = clock() + seconds
    while True:
        step, network, beside, average, precision = _step(config, stage, batch, device)
        began = clock()
        step()  # warms up
        _wait(device)
        first = clock() - began
        if clock() + first < until or batch == 1:
            break
        batch = max(1, batch // 4)  # too slow for a second step of this size
    count, began = 0, clock()
    while count == 0 or (clock() < until and count < 50):
        step()
        count += 1
    _wait(device)
    rate = count * batch / max(clock() - began, 1e-9)
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Measured(
        images_per_s=rate,
        batch=batch,
        memory_gib=peak_memory_gib(device),
        parameters=parameters,
        checkpoint_bytes=checkpoint_bytes(parameters, average=average) + _bytes_beside(beside),
        precision=precision,
    )


def checkpoint_bytes(parameters: int, *, average: bool) -> int:
    """Size of a checkpoint: float32 weights, Adam's two moments, the average where one is kept.

    Formula: 4 * parameters * (3 or 4)
    """
    return 4 * parameters * (4 if average else 3)


def _bytes_beside(network: torch.nn.Module | None) -> int:
    """Of a checkpoint: what a network takes that learns beside the student, its buffers too."""
    if network is None:
        return 0
    numbers = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return checkpoint_bytes(numbers, average=False) + 4 * sum(b.numel() for b in network.buffers())


def _batch(config: RunConfig, stage: str) -> int:
    part = getattr(config, stage)
    return int(part.global_batch if stage.startswith("stage") else part.batch)


def _step(
    config: RunConfig, stage: str, batch: int, device: torch.device
) -> tuple[Callable[[], object], torch.nn.Module, torch.nn.Module | None, bool, str]:
    """What does one step, what it trains, what learns beside, whether there is an average, and the
    precision.
    """
    rank, side = Rank(device=device), config.data.resolution
    pixels = torch.randint(0, 256, (max(batch, 2), 3, side, side), dtype=torch.uint8)
    if stage == "teacher":
        teacher = dataclasses.replace(config.teacher, batch=len(pixels), epochs=10**4)
        targets = Targets(
            classes={"made up": tuple(map(str, range(_CLASSES)))},
            values={"made up": torch.randint(0, _CLASSES, (len(pixels),))},
        )
        precision = choose_precision("auto", device)
        fit = new_teacher_fit(pixels, targets, teacher, rank=rank, precision=precision)
        batches: Iterator[Any] = teacher_batches([""] * len(pixels), teacher)
        return lambda: fit.advance(next(batches)), fit.network, None, False, precision
    if stage == "captions":
        captions = dataclasses.replace(config.captions, batch=max(batch, 2), epochs=10**4)
        made = [(f"a made up caption of some length, number {n}",) for n in range(max(batch, 2))]
        features = torch.randn(len(made), _FEATURES)
        found = new_caption_fit(made, features, captions, rank)
        assert found is not None
        drawn: Iterator[Any] = caption_batches([""] * len(made), made, captions)
        return lambda: found.advance(next(drawn)), found.network, None, False, "float32"
    part = getattr(config, stage)
    network = channels_last(empty_teacher(config.teacher)).to(device)
    precision = choose_precision(part.precision, device)
    trainer = new_trainer(
        cast("StageName", stage),
        new_student(config).to(device),
        network,
        part,
        steps=10**6,
        tap_means=dict.fromkeys(network.names, 1.0),
        precision=precision,
    )
    text = torch.randn(batch, config.captions.dim, device=device)
    taken = Batch(
        keys=("",) * batch,
        pixels=pixels[:batch].contiguous(memory_format=torch.channels_last),
        captions=tuple(map(str, range(batch))),  # that differ, as critics compare them
        labels=({},) * batch,
        epoch=0,
        step=0,
        weight=1.0,
    )
    return (
        lambda: trainer.advance(taken, text, batch),
        trainer.student,
        getattr(trainer, "critics", None),
        part.average_share > 0,
        precision,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

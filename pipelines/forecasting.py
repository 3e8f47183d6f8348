"""`sdn run --dry-run`: what each stage would take, measured here, and what would not fit."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from pipelines.cluster import cores
from pipelines.preparing import prepare_stage
from pipelines.work import possible_workers
from sdn.forecast import STAGES, Measured, measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.run import Run
    from sdn.config import RunConfig

_SECONDS = 25.0
"""For each stage; two minutes for all of them with their starts."""
_LONG_H = 24 * 14


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one stage would take; a search, at most."""

    stage: str
    images_per_s: float
    """Over all workers, as if each added as much as the first."""
    images: int | None
    """In all; None where the data set has not been prepared."""
    hours: float | None
    workers: int
    memory_gib: float
    """Of all workers of a machine."""
    checkpoint_gib: float
    """Of one checkpoint."""
    kept_gib: float
    """Of all that are kept, and the one being written."""
    measured_batch: int
    precision: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What there is."""

    memory_gib: float
    disk_gib: float | None
    """None for a remote store."""


def forecast(
    run: Run,
    say: Callable[[str], None],
    limits: Limits | None = None,
    seconds: float = _SECONDS,
) -> tuple[list[Forecast], list[str]]:
    """Measure each stage in a process of its own.

    Args:
        run: its config and settings; nothing of it is changed.
        say: told what is being measured.
        limits: what there is; None asks this machine.
        seconds: to spend on each stage.

    Returns:
        The forecasts, and warnings of what would not fit, each with what to change.
    """
    limits = _limits(run) if limits is None else limits
    samples = _samples(run)
    found, warnings = [], []
    for stage in STAGES:
        given = run.config.teacher.weights is not None or run.config.teacher.epochs == 0
        if stage == "teacher" and given:
            continue
        if stage == "captions" and run.config.captions.encoder != "char-cnn-rnn":
            continue
        part = getattr(run.config, stage)
        if stage.startswith("stage") and part.epochs == 0:
            continue
        batch = part.global_batch if stage.startswith("stage") else part.batch
        _, workers = possible_workers(run.config, batch, run)
        say(f"measuring {stage.replace('_', ' ')}")
        measured = _measured(run, stage, workers, seconds)
        if measured is None:
            warnings.append(
                f"{stage}: the process that measured it was killed, most likely for its memory: "
                f"{_smaller(stage, run.config)}"
            )
            continue
        found.append(_forecast(stage, part, measured, workers, samples))
        if stage == "stage_two" and run.config.search.trials > 1:
            found.insert(-1, _search(found[-1], run, samples))
    return found, warnings + _warnings(found, limits, run.config)


def _measured(run: Run, stage: str, workers: int, seconds: float) -> Measured | None:
    """None where the measuring process was killed."""
    threads = max(1, cores(run.settings) // workers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(
                _measure, run.config, stage, device, threads, workers, seconds
            ).result()
        except BrokenProcessPool:
            return None


def _measure(
    config: RunConfig, stage: str, device: str, threads: int, workers: int, seconds: float
) -> Measured:
    return measure(
        config,
        stage,
        device=torch.device(device),
        threads=threads,
        workers=workers,
        seconds=seconds,
    )


def _forecast(
    stage: str, part: Any, measured: Measured, workers: int, samples: int | None
) -> Forecast:
    rate = measured.images_per_s * workers
    images = None if samples is None else round(part.epochs * samples)
    size = measured.checkpoint_bytes / 2**30
    return Forecast(
        stage=stage,
        images_per_s=rate,
        images=images,
        hours=None if images is None else images / rate / 3600,
        workers=workers,
        memory_gib=measured.memory_gib * workers,
        checkpoint_gib=size,
        # The newest ones, the best, and the one that is being written.
        kept_gib=size * (getattr(part, "keep", 2) + 2),
        measured_batch=measured.batch,
        precision=measured.precision,
    )


def _search(two: Forecast, run: Run, samples: int | None) -> Forecast:
    """What the search would take if no trial is stopped, at the rate of stage two.

    A trial has a thread a rank, and is about as fast as its share of stage two on all cores.
    """
    search = run.config.search
    there = cores(run.settings)
    at_once = max(1, min(search.trials, there // search.workers))
    rate = two.images_per_s * min(1.0, at_once * search.workers / there)
    if torch.cuda.is_available():  # each trial has a GPU of its own
        at_once, rate = 1, two.images_per_s
    trial_images = search.trials * search.images
    hours = trial_images / rate / 3600
    if search.minutes is not None:
        hours = min(hours, search.minutes / 60)
    # The recipe's own values go to full length, too; one of those trainings is stage two itself,
    # which has a row of its own.
    full_lengths = min(search.reruns, search.trials - 1)
    images = None
    if samples is not None:
        epochs = run.config.stage_two.epochs
        if search.stage_one:
            epochs += run.config.stage_one.epochs
        full_images = round(full_lengths * epochs * samples)
        images = trial_images + full_images
        hours += full_images / two.images_per_s / 3600
    return dataclasses.replace(
        two,
        stage="search",
        images_per_s=rate,
        images=images,
        hours=None if images is None else hours,
        workers=search.workers,
        memory_gib=two.memory_gib * at_once,
        kept_gib=two.checkpoint_gib * search.trials + two.kept_gib * full_lengths,
    )


def _warnings(found: list[Forecast], limits: Limits, config: RunConfig) -> list[str]:
    texts = []
    if config.student.noise and config.stage_three.epochs == 0:
        texts.append(
            f"student.noise={config.student.noise} without a stage three: the distances of stages "
            "one and two use little of it, so images of one caption will be much alike; set "
            "stage_three.epochs and stage_three.diversity, or student.noise=0"
        )
    for one in found:
        if one.memory_gib > limits.memory_gib:
            texts.append(
                f"{one.stage} needs {one.memory_gib:.1f} GiB of memory, there are "
                f"{limits.memory_gib:.1f}: {_smaller(one.stage, config)}"
            )
        if one.hours is not None and one.hours > _LONG_H:
            texts.append(f"{one.stage} would take {one.hours / 24:.0f} days: {_shorter(one.stage)}")
    kept = sum(one.kept_gib for one in found)
    if limits.disk_gib is not None and kept > limits.disk_gib:
        texts.append(
            f"checkpoints take {kept:.1f} GiB, the store's disk has {limits.disk_gib:.1f} free: "
            "name another --store, or keep fewer (the stages' keep)"
        )
    return texts


def _smaller(stage: str, config: RunConfig) -> str:
    """Advice: what to change for less memory."""
    if stage == "search":
        return (
            "lower stage_two.global_batch or data.resolution, raise stage_two.accumulate, or have "
            "fewer trials at a time (SDN_CPUS)"
        )
    text = f"lower {_batch_key(stage)}, workers ({config.workers}) or data.resolution"
    return f"{text}, or raise {stage}.accumulate" if stage in {"stage_one", "stage_two"} else text


def _shorter(stage: str) -> str:
    """Advice: what to change for less time."""
    if stage == "search":
        return "lower search.trials, search.images or search.reruns, or set search.minutes"
    width = f"{stage}.width" if stage in {"teacher", "captions"} else "student.width"
    return f"lower {stage}.epochs or {width}, or train on GPUs"


def _batch_key(stage: str) -> str:
    return f"{stage}.global_batch" if stage.startswith("stage") else f"{stage}.batch"


def _limits(run: Run) -> Limits:
    memory = psutil.virtual_memory().total / 2**30
    if torch.cuda.is_available():
        # Of all, as forecasts are of all workers, and each has a GPU.
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        memory = sum(card.total_memory for card in cards) / 2**30
    if "://" in run.settings.store:
        return Limits(memory_gib=memory, disk_gib=None)
    place = Path(run.settings.store).expanduser().resolve()
    while not place.exists():
        place = place.parent
    return Limits(memory_gib=memory, disk_gib=shutil.disk_usage(place).free / 2**30)


def _samples(run: Run) -> int | None:
    """Training samples of the prepared data set; None where there is none yet."""
    try:
        done = run.store.done(prepare_stage(run.config.data, run.settings).folder)
    except (ValueError, OSError):  # the source is not there: what can be said without it is said
        return None
    return None if done is None else int(done["result"]["samples"]["train"])


def as_rows(found: list[Forecast]) -> list[tuple[str, ...]]:
    """The forecasts as a table for people."""
    return [
        (
            one.stage.replace("_", " "),
            f"{one.images_per_s:.3g}",
            "not known yet" if one.images is None else f"{one.images:,}",
            f"{1e4 / one.images_per_s / 3600:.2g} per 10,000 images"
            if one.hours is None
            # Trials that fall behind end early, and few are worth their full length.
            else f"{'at most ' if one.stage == 'search' else ''}{one.hours:.2g}",
            f"{one.memory_gib:.2g}",
            f"{one.checkpoint_gib:.2g}",
            f"{one.kept_gib:.2g}",
        )
        for one in found
    ]


HEADINGS = (
    "stage",
    "images/s",
    "images",
    "hours",
    "memory, GiB",
    "a checkpoint, GiB",
    "all kept, GiB",
)

NOT_COUNTED = (
    "Hours are of training steps. Preparing, the teacher's reading of all images before captions "
    "are fitted, and the evaluation come on top."
)


def as_dicts(found: list[Forecast]) -> list[dict[str, Any]]:
    """The forecasts as JSON values."""
    return [dataclasses.asdict(one) for one in found]

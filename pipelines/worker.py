"""Runs inside Ray: wraps `sdn.stage_run` for Ray Train and Ray Tune. No Prefect, no MLflow."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.store import open_files, open_store
from sdn import checkpoint as checkpoints
from sdn.config import RunConfig, from_dict
from sdn.data.dataset import open_dataset
from sdn.stage_run import Rank, StageInputs, run_stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from sdn.training import StepReport, Trainer


@dataclass(frozen=True, kw_only=True)
class StageOrder:
    """All that a worker on any node needs to know; plain values only."""

    stage: str
    config: dict[str, Any]
    store: str
    cache: str
    cache_gib: float
    """Limit of the blocks read from S3, in GiB."""
    endpoint: str | None
    data: str
    """Place of the data set."""
    version: str
    """Digest of the version of it that is read, whatever has come since."""
    inputs: dict[str, str]
    """Role of `StageInputs`, the data set apart -> folder in the store."""
    threads: int
    """CPU threads of this process."""

    def run_config(self) -> RunConfig:
        """The resolved config of the run."""
        return from_dict(RunConfig, self.config)

    def fetch(self) -> StageInputs:
        """The inputs: the data set where it lies, the others as local folders of this node."""
        cache = Path(self.cache)
        store = open_store(self.store, cache, self.endpoint)
        data = open_dataset(
            open_files(self.data, cache, self.endpoint, self.cache_gib), self.version
        )
        others = {role: store.fetch(name) for role, name in self.inputs.items()}
        return StageInputs(data=data, **others)


def train_rank(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker.

    Args:
        settings: `order` (fields of a StageOrder) and `points`, the queue to the driver.
    """
    from ray import train
    from ray.train.torch import get_device

    order = StageOrder(**settings["order"])
    torch.set_num_threads(order.threads)
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    say = _speaker(settings["points"])
    say(("worker", {"rank": rank, "world": world, "pid": os.getpid(), "device": str(device)}))

    def save(trainer: Trainer) -> None:
        # Called at the same steps on every rank: Ray's report is a barrier.
        metrics = {"step": trainer.step, "images_seen": trainer.images_seen}
        if rank > 0:
            train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.save(trainer.checkpoint(), Path(folder))
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))

    def report(step: StepReport) -> None:
        if rank == 0:
            say(("step", dataclasses.asdict(step)))

    read: Counter[str] = Counter()
    trainer = run_stage(
        order.stage,  # type: ignore[arg-type]
        order.run_config(),
        order.fetch(),
        save=save,
        report=report,
        resume=_latest(train.get_checkpoint()),
        rank=Rank(rank=rank, world=world, device=device, wrap=_wrap(world), agree=_agree(world)),
        consumed=lambda batch: read.update(batch.keys),
    )
    assert trainer.step == trainer.steps
    say(("read", {"rank": rank, "samples": read.total(), "distinct": len(read)}))


def run_trial(weights: dict[str, Any], settings: dict[str, Any]) -> None:
    """The function that Ray Tune runs for one trial: a short stage two, then its score.

    Args:
        weights: loss weight of each group.
        settings: `order` of stage two, whose config already has the trial's length.
    """
    import ray
    from ray import tune

    from sdn.evaluation import validation_score

    order = StageOrder(**settings["order"])
    torch.set_num_threads(order.threads)
    config = order.run_config()
    changed = dataclasses.replace(config.stage_two.weights, **weights)
    stage = dataclasses.replace(config.stage_two, weights=changed)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    inputs = order.fetch()
    trainer = run_stage(
        "stage_two",
        dataclasses.replace(config, stage_two=stage),
        inputs,
        save=lambda trainer: None,
        report=lambda step: None,
        rank=Rank(device=device),
    )
    tune.report(
        {
            "score": validation_score(
                config, inputs, {name: value.cpu() for name, value in trainer.weights().items()}
            ),
            "images_seen": trainer.images_seen,
        }
    )


def _latest(found: Any) -> checkpoints.Checkpoint | None:
    """The checkpoint from which Ray resumes this run, verified."""
    if found is None:
        return None
    with found.as_directory() as folder:
        return checkpoints.load(Path(folder))


def _wrap(world: int) -> Callable[[nn.Module], nn.Module]:
    """Distributed data parallel where there is more than one rank."""
    if world == 1:
        return lambda module: module
    from torch.nn.parallel import DistributedDataParallel

    return lambda module: DistributedDataParallel(module, gradient_as_bucket_view=True)


def _agree(world: int) -> Callable[[str], str]:
    """Every rank gets rank 0's value: nodes may have processors that choose differently."""
    if world == 1:
        return lambda value: value

    def agree(value: str) -> str:
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    return agree


def _speaker(points: Any) -> Callable[[tuple[str, dict[str, Any]]], None]:
    """Send to the driver without ever waiting for it: its absence must not stop training."""
    from ray.exceptions import RayError

    def say(item: tuple[str, dict[str, Any]]) -> None:
        try:
            points.actor.put_nowait.remote(item)
        except RayError:
            return

    return say

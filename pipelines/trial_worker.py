"""Runs inside Ray Tune: wraps `sdn.trial` for one trial. No Prefect, no MLflow."""

from __future__ import annotations

import json
import math
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from pipelines.reasons import cause, final, reason
from pipelines.trials import WORK
from pipelines.worker import StageOrder
from sdn.checkpoint import Checkpoints
from sdn.memory import keep_freed_memory
from sdn.ranks import Rank, of_process_group
from sdn.space import with_values
from sdn.stage_run import StageInputs
from sdn.trial import Reached, run_trial, rungs_of
from sdn.validation import Validation, pack_parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdn.checkpoint import Checkpoint
    from sdn.stages import StageName

    Say = Callable[[dict[str, Any], Path | None], None]

_POINTER = "pointer.json"
_KEEP = 3
"""Newest checkpoints kept of a member of a population, for others that go on from it."""


def tune_trial(config: dict[str, Any], settings: dict[str, Any]) -> None:
    """The function that Ray Tune runs for one trial.

    A loss that is not finite ends the trial with its reason. What would end the others just so (a
    full disk, damaged data) ends the search. Anything else is raised, and Tune begins it again.

    Args:
        config: `number` and `values` of the trial.
        settings: `order` (fields of a StageOrder, of stage two); `workers`, ranks of the trial;
            `gpu`, whether each has one; `here`, whether all are on this machine; `population`,
            whether trials go on from each other's checkpoints.
    """
    from ray import tune

    def say(metrics: dict[str, Any], pointer: Path | None) -> None:
        held = None if pointer is None else tune.Checkpoint.from_directory(pointer)
        tune.report(metrics, checkpoint=held)

    try:
        if settings["workers"] == 1:
            _alone(config, settings, say)
        else:
            _by_ray_train(config, settings)
    except Exception as error:
        if not final(error):
            raise
        kind = "failed" if isinstance(cause(error), ArithmeticError) else "broken"
        tune.report({kind: reason(error)})


def _alone(config: dict[str, Any], settings: dict[str, Any], say: Say) -> None:
    """The trial in this process."""
    import ray
    from ray import tune

    label = f"{config['number']:04d}"
    pointed = None
    if (given := tune.get_checkpoint()) is not None:
        with given.as_directory() as folder:
            pointed = json.loads((Path(folder) / _POINTER).read_text())
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    _train(settings, config, label, Rank(device=device), say, pointed)


def _by_ray_train(config: dict[str, Any], settings: dict[str, Any]) -> None:
    """The trial as a Ray Train run of its own, of several ranks."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune import get_context
    from ray.tune.integration.ray_train import TuneReportCallback

    from pipelines.rendezvous import Loopback

    order = settings["order"]
    trainer = TorchTrainer(
        trial_rank,
        train_loop_config={"config": config, "settings": settings},
        torch_config=Loopback() if settings["here"] else None,
        scaling_config=ScalingConfig(
            num_workers=settings["workers"],
            use_gpu=settings["gpu"],
            resources_per_worker={"CPU": order["threads"]},
        ),
        run_config=RunConfig(
            # Another start of the search is another run: an old one would be resumed.
            name=f"{order['name']}-{config['number']:04d}-{get_context().get_trial_id()}",
            storage_path=f"{order['store']}/ray",
            # Ranks for which there is no room are an error, not waited for without end.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),  # type: ignore[call-arg]
            callbacks=[cast("Any", TuneReportCallback)()],
        ),
    )
    trainer.fit()


def trial_rank(given: dict[str, Any]) -> None:
    """The function that Ray Train runs on every rank of a trial.

    Args:
        given: `config` and `settings` of the trial, see `tune_trial`.
    """
    from ray import train
    from ray.train.torch import get_device

    def say(metrics: dict[str, Any], pointer: Path | None) -> None:
        del pointer  # no population here
        train.report(metrics)

    stage = StageOrder(**given["settings"]["order"]).run_config().stage_two
    rank = of_process_group(get_device(), compress=stage.compress)
    label = f"{given['config']['number']:04d}"
    _train(given["settings"], given["config"], label, rank, say, None)


def _train(
    settings: dict[str, Any],
    trial: dict[str, Any],
    label: str,
    rank: Rank,
    say: Say,
    pointed: dict[str, Any] | None,
) -> None:
    """Train on this rank, from the newest checkpoint of the trial or the one pointed to."""
    order = StageOrder(**settings["order"])
    torch.set_num_threads(order.threads)
    keep_freed_memory()
    config = with_values(order.run_config(), trial["values"])
    inputs, validation = _opened(json.dumps(settings["order"], sort_keys=True))
    found = _at(order, pointed) if pointed is not None else _newest(order, label)
    rungs = rungs_of(config.search)

    def reached(point: Reached) -> None:
        metrics: dict[str, Any] = {
            "images_seen": point.images_seen,
            "rung": sum(rung <= point.images_seen for rung in rungs),
            "ended": point.done,
        }
        step = None
        if rank.rank == 0:
            standing = validation(point.weights())
            value = standing.score.value
            if value is None or not math.isfinite(value):
                raise FloatingPointError(
                    f"its images have the score {value} after {point.images_seen:,} images seen"
                    f" {standing.score.withheld}"
                )
            parts = f"{WORK}/{label}/parts-{point.images_seen:012d}"
            order.place().write(parts, pack_parts(standing.parts))
            metrics |= {
                "value": value,
                "low": standing.score.low,
                "high": standing.score.high,
                "seconds": round(point.seconds, 2),
                "parts": parts,
            }
            if not point.done or settings["population"]:
                checkpoint = point.checkpoint()
                files = order.files(f"{WORK}/{label}/{point.stage}")
                Checkpoints(files, _KEEP if settings["population"] else 1).save(checkpoint)
                step = checkpoint.step
        if not settings["population"]:
            say(metrics, None)
            return
        # A pointer that Tune hands to whoever goes on from here; the state stays in the place.
        with tempfile.TemporaryDirectory(prefix="sdn-pointer-") as folder:
            pointer = {"label": label, "stage": point.stage, "step": step}
            (Path(folder) / _POINTER).write_text(json.dumps(pointer))
            say(metrics, Path(folder))

    run_trial(config, inputs, reached, resume=found, rank=rank)


@lru_cache(maxsize=1)
def _opened(order: str) -> tuple[StageInputs, Validation]:
    """What all trials of a search read, once for a process: Tune lets one run many trials."""
    opened = StageOrder(**json.loads(order))
    config, folders = opened.run_config(), opened.folders()
    reference = folders.pop("reference")
    inputs = StageInputs(data=opened.dataset(), **folders)
    return inputs, Validation(config, inputs, reference)


def _newest(order: StageOrder, label: str) -> tuple[StageName, Checkpoint] | None:
    stages: tuple[StageName, ...] = ("stage_two", "stage_one")
    for stage in stages:
        found = Checkpoints(order.files(f"{WORK}/{label}/{stage}")).newest()
        if found is not None:
            return stage, found
    return None


def _at(order: StageOrder, pointed: dict[str, Any]) -> tuple[StageName, Checkpoint]:
    files = order.files(f"{WORK}/{pointed['label']}/{pointed['stage']}")
    return pointed["stage"], Checkpoints(files).load(pointed["step"])

"""Starts Ray Train and Ray Tune, on a cluster or in this process, and hands plain results back."""

from __future__ import annotations

import contextvars
import dataclasses
import gc
import logging
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pipelines.cluster import cores, has_gpu
from pipelines.worker import StageOrder, run_trial, train_rank
from sdn import checkpoint as checkpoints
from sdn.config import TAP_GROUPS, LossWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pipelines.settings import Settings
    from sdn.config import RunConfig


logger = logging.getLogger(__name__)
_OVER = "over"
"""Kind of the last item in the queue from the workers."""


class TrainingError(RuntimeError):
    """A stage failed on its workers; the text carries their reason."""


def train_stage(
    order: StageOrder,
    *,
    name: str,
    workers: int,
    listen: Callable[[str, dict[str, Any]], None],
) -> checkpoints.Checkpoint:
    """Run one distillation stage as a Ray Train job; the same name resumes an interrupted one.

    Args:
        order: what to train.
        name: the stage's short key: Ray's run name.
        workers: processes.
        listen: receives ("worker" | "step" | "read", values) while the stage runs.

    Returns:
        The last checkpoint.

    Raises:
        TrainingError: the workers failed.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.queue import Queue

    points = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={"order": dataclasses.asdict(order), "points": points},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=has_gpu(), resources_per_worker={"CPU": order.threads}
        ),
        run_config=RunConfig(
            name=name,
            storage_path=f"{order.store}/ray",
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with _listening(points, listen):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise TrainingError(_reason(error)) from error
    del trainer
    gc.collect()  # its controller's actors stay, and take their share of a core, until then
    assert result.checkpoint is not None, "a finished stage saves its last step"
    with result.checkpoint.as_directory() as folder:
        from pathlib import Path

        return checkpoints.load(Path(folder))


def search_weights(
    order: StageOrder,
    *,
    name: str,
    config: RunConfig,
    settings: Settings,
    listen: Callable[[str, dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Short trials of stage two with other loss weights, under Ray Tune.

    Args:
        order: of a trial; one thread each.
        name: the stage's short key.
        config: of the run.
        settings: where Ray and its storage are.
        listen: receives ("trial", values) as trials end.

    Returns:
        One entry a trial, in the order of their start: `weights` (group -> weight), `score`,
        `error` where it failed. The first has the recipe's own weights.
    """
    import optuna
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = config.search
    defaults = {group: getattr(config.stage_two.weights, group) for group in TAP_GROUPS}
    space = {
        group: tune.loguniform(weight * search.low, weight * search.high)
        for group, weight in defaults.items()
        if weight > 0
    }
    searcher = OptunaSearch(
        metric="score",
        mode="max",
        points_to_evaluate=[{group: defaults[group] for group in space}],
        seed=search.seed,
    )
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, settings={"order": dataclasses.asdict(order)}),
            {"cpu": float(order.threads), "gpu": float(has_gpu())},
        ),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=search.trials,
            search_alg=searcher,
            max_concurrent_trials=max(1, cores(settings) // order.threads),
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=f"{order.store}/ray",
            verbose=0,
            callbacks=[_trial_listener(listen)],
        ),
    )
    found = []
    results = tuner.fit()
    for number in range(len(results)):
        result = results[number]
        weights = defaults | {g: float((result.config or {})[g]) for g in space}
        found.append(
            {
                "weights": weights,
                "score": (result.metrics or {}).get("score"),
                "images_seen": (result.metrics or {}).get("images_seen"),
                "error": None if result.error is None else _reason(result.error),
            }
        )
    return found


def choose_weights(
    trials: list[dict[str, Any]], margin: float, own: LossWeights
) -> tuple[LossWeights, int]:
    """The weights to go on with and the number of their trial, from 0.

    The recipe's own weights (trial 0) stay unless another trial's score is better by more than
    `margin`. Weights of single taps are the recipe's own always: the search moves groups.

    Raises:
        TrainingError: no trial has a score.
    """
    scored = [(t["score"], -n) for n, t in enumerate(trials) if t["score"] is not None]
    if not scored:
        reasons = {t["error"] for t in trials}
        raise TrainingError(f"no trial of the search succeeded: {'; '.join(map(str, reasons))}")
    best, negative = max(scored)
    default = trials[0]["score"]
    number = 0 if default is not None and best <= default + margin else -negative
    return dataclasses.replace(own, **trials[number]["weights"]), number


@contextmanager
def _listening(points: Any, listen: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """Hand what workers say to `listen` in a thread, until the work is over and the queue empty."""
    from ray.exceptions import RayError
    from ray.util.queue import Empty

    def drain() -> None:
        # Long waits: asking five times a second took 5% of a core from the training beside it.
        while True:
            try:
                kind, values = points.get(timeout=30)
            except Empty:
                continue
            except RayError:
                logger.warning("the queue of the workers' reports is gone; training goes on")
                return
            if kind == _OVER:
                return
            try:
                listen(kind, values)
            except Exception as error:  # noqa: BLE001 (whatever a listener does)
                logger.warning("a report of the workers was lost: %s", error)

    # In the caller's context: its listeners ask Prefect which run they belong to.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(drain,), name="points", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with suppress(RayError):
            points.put((_OVER, {}))
        thread.join(timeout=60)
        points.shutdown()


def _trial_listener(listen: Callable[[str, dict[str, Any]], None]) -> Any:
    """A Tune callback that hands each ended trial to `listen`."""
    from ray.tune import Callback

    class Listener(Callback):
        def __init__(self, hear: Callable[[str, dict[str, Any]], None]) -> None:
            self._hear = hear

        def __getstate__(self) -> dict[str, Any]:
            # Tune keeps callbacks with the experiment, but what listens belongs to this process.
            return {"_hear": _deaf}

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            del iteration, trials, info
            self._hear("trial", {"config": trial.config, "score": trial.last_result.get("score")})

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            del iteration, trials, info
            self._hear("trial", {"config": trial.config, "score": None})

    return Listener(listen)


def _deaf(kind: str, values: dict[str, Any]) -> None:
    del kind, values


def _reason(error: BaseException) -> str:
    """The first cause of a worker's failure, in one paragraph."""
    worker_errors: Mapping[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    for inner in worker_errors.values():
        return _reason(inner)
    cause = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, BaseException):
        return _reason(cause)
    return f"{type(error).__name__}: {error}"

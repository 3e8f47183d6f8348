"""Starts Ray Tune, on a cluster or in this process, and hands plain results back."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pipelines.cluster import cores, has_gpu
from pipelines.reasons import TrainingError, reason
from pipelines.worker import StageOrder, run_trial
from sdn.config import TAP_GROUPS, LossWeights

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.settings import Settings
    from sdn.config import RunConfig


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
                "error": None if result.error is None else reason(result.error),
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

"""Starts Ray Tune, on a cluster or in this process; what comes of it is in the ledger."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipelines.cluster import cores, free_reserved, has_gpu, started_here
from pipelines.reasons import reason
from pipelines.suggesting import ledger_searcher
from pipelines.trial_worker import tune_trial
from pipelines.trials import Trial, TrialLedger, lower_is_better
from sdn.space import space_of
from sdn.trial import first_rung

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.settings import Settings
    from pipelines.worker import StageOrder
    from sdn.config import RunConfig, SearchConfig

logger = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.5
_ATTEMPTS = 2
"""How often a trial is begun again whose process was lost."""
_LATE = "the time for trials (search.minutes) was over"


def run_trials(
    order: StageOrder,
    ledger: TrialLedger,
    *,
    config: RunConfig,
    settings: Settings,
    listen: Callable[[Trial], None],
) -> None:
    """Run the trials of a search that the ledger does not have yet, under Ray Tune.

    As many at a time as there is room for, each rank with a core (and a GPU, where there are some)
    of its own. Every event is in the ledger before anything follows from it.

    Args:
        order: of a trial.
        ledger: what is known; grows.
        config: of the run.
        settings: where Ray is.
        listen: receives each trial whose record has changed.
    """
    search = config.search
    left = None if search.minutes is None else 60 * search.minutes - ledger.spent_s
    wanting = search.trials - sum(trial.ended for trial in ledger.all())
    following = _Following(ledger, listen, left)
    if wanting <= 0 or following.late():
        following.end()
        return
    tuner = _tuner(order, following, config, settings, wanting, left)
    done: Future[Any] = Future()

    def fit() -> None:
        try:
            done.set_result(tuner.fit())
        except BaseException as error:  # noqa: BLE001 (handed on)
            done.set_exception(error)

    # In a thread: so that this one can be interrupted, and Tune leaves its signals alone.
    threading.Thread(target=fit, name="tune", daemon=True).start()
    try:
        while not done.done():
            with suppress(TimeoutError):
                done.exception(timeout=_LOOK_EVERY_S)
            following.check()
        done.result()
        following.check()
        following.end()
    finally:
        following.close()
        if started_here():
            free_reserved()


def _tuner(
    order: StageOrder,
    following: _Following,
    config: RunConfig,
    settings: Settings,
    wanting: int,
    left_s: float | None,
) -> Any:
    """Tune, ready to run so many trials."""
    from ray import tune

    # Tune asks for a metric at every report; a trial that failed has none.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1")
    search = config.search
    gpu = has_gpu()
    given = {
        "order": dataclasses.asdict(order),
        "workers": search.workers,
        "population": search.scheduler == "pbt",
        "gpu": gpu,
    }
    # A trial of several ranks only waits for them: they have the cores.
    own = {"cpu": float(order.threads), "gpu": float(gpu)}
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(tune_trial, settings=given),
            own if search.workers == 1 else {"cpu": 0},
        ),
        tune_config=tune.TuneConfig(
            num_samples=wanting,
            search_alg=ledger_searcher(config, following.ledger),
            scheduler=_scheduler(config, following.ledger),
            max_concurrent_trials=_at_once(order, search, settings, gpu=gpu),
            time_budget_s=left_s,
        ),
        run_config=tune.RunConfig(
            name=f"{order.name}-{int(time.time())}",  # the ledger is what is gone on with
            storage_path=f"{order.store}/ray",
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=_ATTEMPTS),
            callbacks=[_callback(following)],
        ),
    )


def _at_once(order: StageOrder, search: SearchConfig, settings: Settings, *, gpu: bool) -> int:
    """Trials at a time: as many as the cores (and GPUs) hold."""
    import ray

    if settings.ray_address is None:
        room = cores(settings) / (order.threads * search.workers)
    else:
        room = ray.cluster_resources().get("CPU", 1) / (order.threads * search.workers)  # type: ignore[no-untyped-call]
    if gpu:
        room = min(room, ray.cluster_resources().get("GPU", 1) / search.workers)  # type: ignore[no-untyped-call]
    return max(1, int(room))


def _scheduler(config: RunConfig, ledger: TrialLedger) -> Any:
    """ASHA over images seen, or population based training, or none; told of what the ledger has."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
    from ray.tune.schedulers.trial_scheduler import TrialScheduler

    search = config.search
    asked: dict[str, Any] = {"metric": "value", "mode": "min" if lower_is_better(search) else "max"}
    if search.scheduler == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    if search.scheduler == "pbt":
        from ray.tune import loguniform

        space = space_of(config)
        return PopulationBasedTraining(
            time_attr="images_seen",
            perturbation_interval=first_rung(search),
            hyperparam_mutations={
                "values": {name: loguniform(low, high) for name, (low, high) in space.items()}
            },
            **asked,
        )

    class KeepingOwn(ASHAScheduler):
        """The recipe's own values run to the end: all others are compared with them."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            action = super().on_trial_result(tune_controller, trial, result)
            own = trial.config["number"] == 0 and result.get("images_seen", 0) < search.images
            return TrialScheduler.CONTINUE if own else action

    asha = KeepingOwn(
        time_attr="images_seen",
        grace_period=first_rung(search),
        max_t=search.images,
        reduction_factor=search.reduction,
        **asked,
    )
    nobody: Any = None  # its controller, which it does not ask
    for trial in ledger.all():
        if trial.ended and trial.state != "failed":
            about: Any = SimpleNamespace(
                trial_id=f"before-{trial.number}", config={"number": trial.number}
            )
            asha.on_trial_add(nobody, about)
            for point in trial.points:
                asha.on_trial_result(nobody, about, point)
    return asha


class _Following:
    """Puts down in the ledger what Tune tells of its trials."""

    def __init__(
        self, ledger: TrialLedger, listen: Callable[[Trial], None], left_s: float | None = None
    ) -> None:
        self.ledger, self._listen, self._left_s = ledger, listen, left_s
        self._began, self._before = time.monotonic(), ledger.spent_s
        self._numbers: dict[str, int] = {}
        self._lock, self._open = threading.Lock(), True
        self._error: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps callbacks with the experiment, but what listens belongs to this process.
        return {"_open": False}

    def late(self) -> bool:
        """Whether the time for trials is over."""
        return self._left_s is not None and time.monotonic() - self._began >= self._left_s

    def end(self) -> None:
        """Tune has ended by itself: where the time is over, nothing is left to be gone on with."""
        if self.late():
            for trial in self.ledger.open():
                trial.state, trial.reason = "stopped", _LATE
                self.ledger.write(trial)

    def close(self) -> None:
        """From now on nothing is put down: what comes now is Ray being ended."""
        with self._lock:
            self._open = False

    def check(self) -> None:
        """Raise what went wrong in writing: a ledger that cannot be written ends the search."""
        if self._error is not None:
            raise self._error

    def begun(self, tune_id: str, number: int) -> None:
        """A trial has this number, whatever its config says later: a population copies configs."""
        if self._open:
            self._numbers.setdefault(tune_id, number)

    def heard(self, tune_id: str, result: dict[str, Any], values: dict[str, float]) -> None:
        """A trial is at a rung, or has failed for good."""

        def change(trial: Trial) -> None:
            if "failed" in result:
                trial.state, trial.reason = "failed", result["failed"]
                return
            kept = ("images_seen", "value", "low", "high", "seconds", "parts")
            point = {name: result[name] for name in kept}
            before = [p for p in trial.points if p["images_seen"] == point["images_seen"]]
            if before:  # looked at again after a restart
                point["seconds"] = before[0]["seconds"]
            if values != trial.values:
                point["values"] = trial.values = dict(values)
            trial.add(point)
            if result["ended"]:
                trial.state = "finished"

        self._edit(tune_id, change)

    def over(self, tune_id: str, error: BaseException | None) -> None:
        """Tune is done with a trial."""

        def change(trial: Trial) -> None:
            if trial.ended:
                return
            if error is not None:
                trial.state, trial.reason = "failed", reason(error)
            elif self.late():
                trial.state, trial.reason = "stopped", _LATE
            elif trial.points:
                behind = f"behind the others at {trial.images_seen:,} images seen"
                trial.state, trial.reason = "stopped", behind
            else:
                trial.state, trial.reason = "failed", "it ended without a score"

        self._edit(tune_id, change)

    def _edit(self, tune_id: str, change: Callable[[Trial], None]) -> None:
        """Change a record, write it, tell of it; what goes wrong is kept for the main thread."""
        with self._lock:
            if not self._open or tune_id not in self._numbers:
                return
            try:
                trial = self.ledger.trials[self._numbers[tune_id]]
                change(trial)
                self.ledger.write(trial)
                self.ledger.spend(self._before + time.monotonic() - self._began)
                if trial.ended:
                    self.ledger.clear_checkpoints(trial.number)
            except BaseException as error:
                self._error = error
                raise
        self._listen(trial)


def _callback(following: _Following) -> Any:
    """A Tune callback that hands events on."""
    from ray.tune import Callback

    class Listener(Callback):
        def on_trial_start(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            del iteration, trials, info
            following.begun(trial.trial_id, trial.config["number"])

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            del iteration, trials, info
            following.heard(trial.trial_id, result, trial.config["values"])

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            del iteration, trials, info
            following.over(trial.trial_id, None)

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            del iteration, trials, info
            # An error's pickle may need what only its worker has; its text is always there.
            error = trial.get_error() if hasattr(trial, "get_error") else None
            following.over(trial.trial_id, error or RuntimeError("its process was lost"))

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return Listener()

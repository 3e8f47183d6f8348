"""Starts Ray Tune, on a cluster or in this process; what comes of it is in the ledger."""

from __future__ import annotations

import contextvars
import dataclasses
import os
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipelines.cluster import cores, free_reserved, has_gpu, start_ray, started_here
from pipelines.reasons import TrainingError, reason
from pipelines.schedulers import scheduler_of
from pipelines.suggesting import begin_all, ledger_searcher
from pipelines.trial_worker import tune_trial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipelines.settings import Settings
    from pipelines.trials import Trial, TrialLedger
    from pipelines.worker import StageOrder
    from sdn.config import RunConfig, SearchConfig

_LOOK_EVERY_S = 0.5
_ATTEMPTS = 2
"""How often a trial is begun again whose process was lost."""
_WAITING_BYTES = 64 * 1024**2
"""Reserved for a trial of several ranks beside them; Tune wants it to have something."""
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
    following = _Following(ledger, listen, left, population=search.scheduler == "pbt")
    if wanting <= 0 or following.late():
        following.end()
        return
    start_ray(settings)
    tuner = _tuner(order, following, config, settings, wanting, left)
    done: Future[Any] = Future()

    def fit() -> None:
        try:
            done.set_result(tuner.fit())
        except BaseException as error:  # noqa: BLE001 (handed on)
            done.set_exception(error)

    # In a thread: so that this one can be interrupted, and Tune leaves its signals alone. What
    # listens is told there, and finds the terminal and Prefect's run in the context.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(fit,), name="tune", daemon=True).start()
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
    search = config.search
    if search.scheduler != "pbt":  # suggested when there is room, knowing as much as can be
        os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1")
    gpu = has_gpu()
    given = {
        "order": dataclasses.asdict(order),
        "workers": search.workers,
        "population": search.scheduler == "pbt",
        "gpu": gpu,
        "here": started_here(),
    }
    own = {"cpu": float(order.threads), "gpu": float(gpu)}
    if search.workers > 1:  # it only waits for its ranks: they have the cores
        own = {"memory": _WAITING_BYTES}
    space, asked = _asked(order, following.ledger, config, settings, wanting, gpu=gpu)
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(tune_trial, settings=given), own),
        param_space=space,
        tune_config=tune.TuneConfig(
            scheduler=scheduler_of(config, following.ledger),
            time_budget_s=left_s,
            # The next trial in the same process: importing torch takes it seconds. One that waits
            # for a Ray Train run of its own cannot be left in the middle.
            reuse_actors=search.workers == 1,
            **asked,
        ),
        run_config=tune.RunConfig(
            name=f"{order.name}-{int(time.time())}",  # the ledger is what is gone on with
            storage_path=f"{order.store}/ray",
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=_ATTEMPTS),
            callbacks=[_callback(following)],
        ),
    )


def _asked(
    order: StageOrder,
    ledger: TrialLedger,
    config: RunConfig,
    settings: Settings,
    wanting: int,
    *,
    gpu: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The space that Tune draws from, and what else it has to know to draw from it."""
    from ray import tune

    if config.search.scheduler != "pbt":
        return {}, {
            "num_samples": wanting,
            "search_alg": ledger_searcher(config, ledger),
            "max_concurrent_trials": _at_once(order, config.search, settings, gpu=gpu),
        }
    # A population takes no searcher: all its members are known before it begins.
    values = {trial.number: trial.values for trial in begin_all(config, ledger)}

    def values_of(config: dict[str, Any]) -> dict[str, float]:
        return dict(values[config["number"]])

    return {
        "number": tune.grid_search(sorted(values)),
        "values": tune.sample_from(values_of),
    }, {"num_samples": 1}


def _at_once(order: StageOrder, search: SearchConfig, settings: Settings, *, gpu: bool) -> int:
    """Trials at a time: as many as the cores (and GPUs) hold."""
    import ray

    if settings.ray_address is None:
        room = cores(settings) / (order.threads * search.workers)
    elif search.workers == 1:  # the cluster may grow; Tune waits for room with one trial
        return search.trials
    else:
        room = ray.cluster_resources().get("CPU", 1) / (order.threads * search.workers)  # type: ignore[no-untyped-call]
    if gpu:
        room = min(room, ray.cluster_resources().get("GPU", 1) / search.workers)  # type: ignore[no-untyped-call]
    return max(1, int(room))


class _Following:
    """Puts down in the ledger what Tune tells of its trials."""

    def __init__(
        self,
        ledger: TrialLedger,
        listen: Callable[[Trial], None],
        left_s: float | None = None,
        *,
        population: bool = False,
    ) -> None:
        self.ledger, self._listen, self._left_s = ledger, listen, left_s
        self._population = population
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
        """Tune has ended by itself: nothing is left to be gone on with."""
        if self.late():
            for trial in self.ledger.open():
                trial.state, trial.reason = "stopped", _LATE
                self.ledger.write(trial)
        self.ledger.clear_checkpoints()

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
        if "broken" in result:
            self._end(f"a trial could not be run: {result['broken']}")
            return

        old: list[str] = []

        def change(trial: Trial) -> None:
            if "failed" in result:
                self._fail(trial, result["failed"])
                return
            kept = ("images_seen", "value", "low", "high", "seconds", "parts")
            point = {name: result[name] for name in kept}
            before = [p for p in trial.points if p["images_seen"] == point["images_seen"]]
            old.extend(  # only those of the last rung are compared
                earlier.pop("parts")
                for earlier in trial.points
                if earlier["images_seen"] < point["images_seen"] and "parts" in earlier
            )
            if before:  # looked at again after a restart
                point["seconds"] = before[0]["seconds"]
            if values != trial.values or any("values" in earlier for earlier in before):
                point["values"] = trial.values = dict(values)
            trial.add(point)
            if result["ended"]:
                trial.state = "finished"

        self._edit(tune_id, change, old)

    def over(self, tune_id: str, error: BaseException | None) -> None:
        """Tune is done with a trial."""

        def change(trial: Trial) -> None:
            if trial.ended:
                return
            if error is not None:
                self._fail(trial, reason(error))
            elif self.late():
                trial.state, trial.reason = "stopped", _LATE
            elif trial.points:
                behind = f"behind the others at {trial.images_seen:,} images seen"
                trial.state, trial.reason = "stopped", behind
            else:
                self._fail(trial, "it ended without a score")

        self._edit(tune_id, change)

    def _fail(self, trial: Trial, why: str) -> None:
        """A trial has failed; without the recipe's own there is nothing to compare with."""
        if trial.number == 0:
            self._end(f"the trial with the recipe's own values failed: {why}")
        else:
            trial.state, trial.reason = "failed", why

    def _end(self, why: str) -> None:
        """The search is over; what is said after the first reason follows from it."""
        if self._error is None:
            self._error = TrainingError(why)

    def _edit(self, tune_id: str, change: Callable[[Trial], None], old: Sequence[str] = ()) -> None:
        """Change a record, write it, remove old files, tell of it.

        What goes wrong is kept for the main thread.
        """
        with self._lock:
            if not self._open or tune_id not in self._numbers:
                return
            try:
                trial = self.ledger.trials[self._numbers[tune_id]]
                change(trial)
                self.ledger.write(trial)
                self.ledger.spend(self._before + time.monotonic() - self._began)
                for name in old:
                    self.ledger.remove(name)
                if trial.ended and not self._population:  # whose members may copy an ended one
                    self.ledger.clear_checkpoints(trial.number)
            except BaseException as error:
                self._error = error
                raise
        self._listen(trial)


def _callback(following: _Following) -> Any:
    """A Tune callback that hands events on."""
    from ray.tune import Callback

    class Listener(Callback):
        # Not out of the closure: what pickles this class would change it for all.
        def __init__(self, following: _Following) -> None:
            self._following = following

        def on_trial_start(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            del iteration, trials, info
            self._following.begun(trial.trial_id, trial.config["number"])

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            del iteration, trials, info
            self._following.heard(trial.trial_id, result, trial.config["values"])

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            del iteration, trials, info
            self._following.begun(trial.trial_id, trial.config["number"])
            self._following.over(trial.trial_id, None)

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            del iteration, trials, info
            # Where its process could not be made, it is an error before it has begun.
            self._following.begun(trial.trial_id, trial.config["number"])
            # An error's pickle may need what only its worker has; its text is always there.
            error = trial.get_error() if hasattr(trial, "get_error") else None
            self._following.over(trial.trial_id, error or RuntimeError("its process was lost"))

    return Listener(following)

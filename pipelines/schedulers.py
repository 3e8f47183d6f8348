"""Which trials go on: ASHA over images seen, or population based training, as Ray Tune has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipelines.trials import lower_is_better
from sdn.space import space_of
from sdn.trial import first_rung

if TYPE_CHECKING:
    from pipelines.trials import TrialLedger
    from sdn.config import RunConfig


def scheduler_of(config: RunConfig, ledger: TrialLedger) -> Any:
    """The scheduler that a search asks for; told of what the ledger has.

    Args:
        config: of the run.
        ledger: trials of earlier attempts.
    """
    from ray.tune.schedulers import FIFOScheduler

    if config.search.scheduler == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    return _population(config) if config.search.scheduler == "pbt" else _asha(config, ledger)


def _asha(config: RunConfig, ledger: TrialLedger) -> Any:
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.schedulers.trial_scheduler import TrialScheduler

    search = config.search

    class KeepingOwn(ASHAScheduler):
        """The recipe's own values run to the end: all others are compared with them."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            action = super().on_trial_result(tune_controller, trial, result)
            own = trial.config["number"] == 0 and result.get("images_seen", 0) < search.images
            return TrialScheduler.CONTINUE if own else action

    asha = KeepingOwn(
        time_attr="images_seen",
        metric="value",
        mode=_mode(config),
        grace_period=first_rung(search),
        max_t=search.images,
        reduction_factor=search.reduction,
    )
    nobody: Any = None  # its controller, which it does not ask
    for trial in ledger.all():
        about: Any = SimpleNamespace(
            trial_id=f"before-{trial.number}", config={"number": trial.number}
        )
        asha.on_trial_add(nobody, about)
        # What is gone on with says its last rung again.
        for point in trial.points if trial.ended else trial.points[:-1]:
            asha.on_trial_result(nobody, about, point)
    return asha


def _population(config: RunConfig) -> Any:
    from ray.tune import loguniform
    from ray.tune.schedulers import PopulationBasedTraining
    from ray.tune.schedulers.trial_scheduler import TrialScheduler

    space = space_of(config)

    class Population(PopulationBasedTraining):
        """Members keep their numbers; that of the recipe's own values copies nobody."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            # Without a score there is nothing to compare; a copy of the end would not be trained.
            if result.get("ended", True):
                return TrialScheduler.CONTINUE
            return super().on_trial_result(tune_controller, trial, result)

        def _quantiles(self) -> tuple[list[Any], list[Any]]:
            behind, ahead = super()._quantiles()
            scores = {
                trial: state.last_score
                for trial, state in self._trial_state.items()
                if state.last_score is not None and not trial.is_finished()  # type: ignore[no-untyped-call]
            }
            others = [t for t in scores if t.config["number"] != 0 and t not in ahead]
            return sorted(others, key=lambda trial: scores[trial])[: len(behind)], ahead

        def _get_new_config(self, trial: Any, trial_to_clone: Any) -> Any:
            found, operations = super()._get_new_config(trial, trial_to_clone)
            return found | {"number": trial.config["number"]}, operations

    def within(found: dict[str, Any]) -> dict[str, Any]:
        values = found["values"].items()
        return found | {"values": {n: min(max(v, space[n][0]), space[n][1]) for n, v in values}}

    return Population(
        # Counted, because images seen are a multiple of the batch, and seldom just a rung's.
        time_attr="rung",
        metric="value",
        mode=_mode(config),
        perturbation_interval=1,
        hyperparam_mutations={
            "values": {name: loguniform(low, high) for name, (low, high) in space.items()}
        },
        custom_explore_fn=within,
        # All wait for each other at a rung, so that whoever is copied has seen as many images.
        synch=True,
        log_config=False,
    )


def _mode(config: RunConfig) -> str:
    return "min" if lower_is_better(config.search) else "max"

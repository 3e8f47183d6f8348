"""What to try next: Optuna's TPE over what the ledger knows.

Each suggestion is a function of the seed, the trial's number and the trials so far, so that no
state of a sampler has to outlive a process that is killed.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Any

from pipelines.trials import Trial, TrialLedger, lower_is_better
from sdn.space import own_values, space_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import optuna

    from sdn.config import RunConfig, SearchConfig


def study_of(
    trials: Iterable[Trial],
    space: Mapping[str, tuple[float, float]],
    search: SearchConfig,
    sampler: Any = None,
) -> optuna.Study:
    """Trials as an Optuna study in memory.

    Args:
        trials: of the ledger.
        space: name -> smallest and largest value.
        search: says which direction is better.
        sampler: of the study; Optuna's own choice where there is none to ask.
    """
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = {
        "finished": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "running": TrialState.RUNNING,
        "failed": TrialState.FAIL,
    }
    study = optuna.create_study(
        sampler=sampler, direction="minimize" if lower_is_better(search) else "maximize"
    )
    distributions = {n: FloatDistribution(a, b, log=True) for n, (a, b) in space.items()}
    for trial in trials:
        state = states[trial.state]
        if state is TrialState.PRUNED and not trial.points:  # stopped before its first rung
            state = TrialState.FAIL
        study.add_trial(
            create_trial(
                state=state,
                value=trial.value if state is TrialState.COMPLETE else None,
                # A population's values may leave the range on their way.
                params={
                    n: min(max(trial.values[n], low), high) for n, (low, high) in space.items()
                },
                distributions=dict(distributions),
                intermediate_values={p["images_seen"]: p["value"] for p in trial.points},
                user_attrs={"number": trial.number},
            )
        )
    return study


def suggestion(config: RunConfig, trials: Iterable[Trial], number: int) -> dict[str, float]:
    """Values for the trial of this number.

    The first has the recipe's own, the next ones are drawn at random, each from its number alone;
    then Tree-structured Parzen Estimator (Bergstra et al. 2011) learns from those that ended, and
    takes those that run for bad ones, so that it does not ask for the same twice.
    """
    from optuna.distributions import FloatDistribution
    from optuna.samplers import RandomSampler, TPESampler

    search = config.search
    if number == 0:
        return own_values(config)
    seed = int.from_bytes(hashlib.sha256(f"{search.seed} {number}".encode()).digest()[:4])
    if number <= search.random_trials or search.scheduler == "pbt":
        sampler: Any = RandomSampler(seed=seed)
    else:
        sampler = TPESampler(seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True)
    space = space_of(config)
    study = study_of(trials, space, search, sampler)
    asked = study.ask(
        {n: FloatDistribution(low, high, log=True) for n, (low, high) in space.items()}
    )
    return {name: float(value) for name, value in asked.params.items()}


def begin_all(config: RunConfig, ledger: TrialLedger) -> list[Trial]:
    """All trials of a search that have not ended, begun in the ledger where they were not."""
    for number in range(config.search.trials):
        if number not in ledger.trials:
            ledger.write(Trial(number=number, values=suggestion(config, ledger.all(), number)))
    return ledger.open()


def ledger_searcher(config: RunConfig, ledger: TrialLedger) -> Any:
    """A searcher for Ray Tune: what the ledger has open, then new suggestions up to the number.

    What it suggests is in the ledger before it runs.
    """
    from ray.tune.search import Searcher

    class LedgerSearcher(Searcher):
        # Held by the object, not by its class: who unpickles it here would change the class.
        def __init__(self, config: RunConfig, ledger: TrialLedger) -> None:
            super().__init__()
            self._config, self._ledger = config, ledger
            self._open = [trial.number for trial in ledger.open()]

        def __getstate__(self) -> dict[str, Any]:
            return {}  # the ledger is the state

        def suggest(self, trial_id: str) -> Any:
            del trial_id
            config, ledger = self._config, self._ledger
            if self._open:
                trial = ledger.trials[self._open.pop(0)]
            else:
                number = next(n for n in itertools.count() if n not in ledger.trials)
                if number >= config.search.trials:
                    return Searcher.FINISHED
                trial = Trial(number=number, values=suggestion(config, ledger.all(), number))
                ledger.write(trial)
            return {"number": trial.number, "values": trial.values}

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            del trial_id, result, error

        def save(self, checkpoint_path: str) -> None:
            del checkpoint_path

        def restore(self, checkpoint_path: str) -> None:
            del checkpoint_path

    return LedgerSearcher(config, ledger)

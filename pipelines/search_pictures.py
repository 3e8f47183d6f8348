"""Pictures of a search: interactive pages and PNG files, by Optuna's own plots."""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.suggesting import study_of
from pipelines.trials import lower_is_better
from sdn.space import space_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import optuna

    from pipelines.trials import Trial
    from sdn.config import RunConfig

HISTORY, PARALLEL, IMPORTANCE = "history", "parallel-coordinates", "importance"
PICTURES = "pictures"
"""Folder of the stage."""
_LEAST = 4
"""Trials with a score below which nothing can be said of importance."""


def write_pictures(folder: Path, trials: Sequence[Trial], config: RunConfig) -> dict[str, str]:
    """Optimisation history, parallel coordinates and importance, each as HTML and PNG.

    The pages need no network. Trials that ended early are drawn with their last score, except in
    the history: its line of the best would take a score after few images for one after all.

    Args:
        folder: of the stage.
        trials: of the ledger.
        config: of the run.

    Returns:
        Name of a picture -> why it could not be drawn; empty where all were.
    """
    import matplotlib as mpl
    import optuna

    place = folder / PICTURES
    place.mkdir(exist_ok=True)
    study = study_of([_ended(trial) for trial in trials], space_of(config), config.search)
    whole = [trial for trial in trials if trial.state == "finished"]
    ended = study_of(whole or [_ended(trial) for trial in trials], space_of(config), config.search)
    label = "KID" if lower_is_better(config.search) else "reciprocal rank"
    missing = {}
    looks = {"backend": "Agg", "figure.figsize": (10, 5), "figure.dpi": 110}
    with mpl.rc_context(looks), warnings.catch_warnings():  # type: ignore[arg-type]
        # Optuna calls its matplotlib plots experimental; they have been so for years.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for name, draw in _pages(study, ended, label).items():
            try:
                draw(place)
            except Exception as error:  # noqa: BLE001 (a picture is worth no search)
                missing[name] = str(error)
    return missing


def _ended(trial: Trial) -> Trial:
    """A trial as the plots take it: whatever has a score is drawn."""
    return dataclasses.replace(trial, state="finished") if trial.points else trial


def _pages(
    study: optuna.Study, ended: optuna.Study, label: str
) -> dict[str, Callable[[Path], None]]:
    from optuna import visualization as pages
    from optuna.visualization import matplotlib as prints

    drawn: dict[str, tuple[Any, Any]] = {
        HISTORY: (pages.plot_optimization_history, prints.plot_optimization_history),
        PARALLEL: (pages.plot_parallel_coordinate, prints.plot_parallel_coordinate),
        IMPORTANCE: (pages.plot_param_importances, prints.plot_param_importances),
    }

    def draw(name: str, place: Path) -> None:
        from matplotlib import pyplot as plt

        page, printed = drawn[name]
        scored = sum(trial.value is not None for trial in study.trials)
        if name == IMPORTANCE and scored < _LEAST:
            raise ValueError(f"importance needs {_LEAST} trials with a score, there are {scored}")
        shown = ended if name == HISTORY else study
        page(shown, target_name=label).write_html(place / f"{name}.html", include_plotlyjs=True)
        axes: Any = printed(shown, target_name=label)
        axes.figure.savefig(place / f"{name}.png", bbox_inches="tight")
        plt.close(axes.figure)

    return {name: partial(draw, name) for name in drawn}

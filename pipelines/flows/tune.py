"""The search alone: the stages that it needs, its trials, and the weights that it found."""

from __future__ import annotations

from typing import Any

from prefect import flow

from pipelines.flows.form import (
    AS_RECIPE,
    AtLeastTwo,
    Epochs,
    Minutes,
    Rate,
    RecipeName,
    Resolution,
    Seed,
    SourceName,
    Workers,
)
from pipelines.flows.notices import HOOKS, guarding
from pipelines.flows.opening import open_run, own_ray
from pipelines.flows.showing import show_found
from pipelines.flows.stages import Tracked, do
from pipelines.leaving_out import never_raising
from pipelines.run import Done, Run
from pipelines.search_tables import told


@flow(name="sdn-tune", description=__doc__, **HOOKS)
@guarding
def tune(
    recipe: RecipeName = "openmoji",
    source: SourceName = AS_RECIPE,
    data_path: str = "",
    resolution: Resolution = 0,
    stage_one_epochs: Epochs = 0.0,
    stage_two_epochs: Epochs = 0.0,
    learning_rate: Rate = 0.0,
    search_trials: AtLeastTwo = 8,
    search_minutes: Minutes = 0.0,
    seed: Seed = 0,
    workers: Workers = 0,
    store: str = "",
    changes: list[str] = [],  # noqa: B006 (Prefect's form reads the default; it is never changed)
) -> dict[str, Any]:
    """Prepare, teacher, captions, stage one, search: which loss weights are better beyond chance.

    Args:
        recipe: Named run to start from; its own weights are the first trial.
        source: Layout of the images in data_path.
        data_path: Where the images lie: a folder on the worker's machine, for some sources also
            s3://bucket/prefix. Empty for openmoji, which carries its own.
        resolution: Height and width of the images in pixels, a multiple of 32. 0: as the recipe
            says.
        stage_one_epochs: Passes over the training images in stage one. 0: as the recipe says.
        stage_two_epochs: Passes over the training images in stage two, at which the best trials
            are trained again. 0: as the recipe says.
        learning_rate: Peak learning rate of both stages, below 1. 0: as the recipe says.
        search_trials: Trials in all, at least 2.
        search_minutes: Time for the short trials; when it is over the running ones are stopped.
            0: as the recipe says.
        seed: Initial weights and order of the images in all stages. 0: as the recipe says.
        workers: Training processes of each stage, a divisor of 48. 0: as the recipe says.
        store: Folder or s3://bucket/prefix for all results. Empty: the configured one.
        changes: Everything else, each key=value, such as search.images=9600 or search.scheduler=pbt
            (`sdn run --dry-run` lists the keys).

    Returns:
        What was found and how to use it; JSON values.
    """
    from pipelines.flows.chain import on_data  # torch and MLflow, which a form has no need of

    run = open_run(
        recipe,
        store,
        changes,
        source=source,
        data_path=data_path,
        resolution=resolution,
        stage_one_epochs=stage_one_epochs,
        stage_two_epochs=stage_two_epochs,
        learning_rate=learning_rate,
        search_trials=search_trials,
        search_minutes=search_minutes,
        seed=seed,
        workers=workers,
    )
    with own_ray(run.settings):
        return summary(run, on_data(run, lambda tracked, data: search(run, tracked, data)))


def search(run: Run, tracked: Tracked, data: Done) -> Done:
    """The search, and before it what it needs."""
    from pipelines import evaluating, work
    from pipelines.flows.chain import searched_for

    taught = do(run, work.teacher(run, data), tracked)
    real = do(run, evaluating.reference(run, data, taught), tracked)
    encoder = do(run, work.captions(run, data, taught), tracked)
    inputs = {"data": data, "teacher": taught, "captions": encoder}
    searched, _ = searched_for(run, tracked, inputs, real)
    with never_raising("end of the run"):
        tracked.tracker.finish(tracked.parent)
    show_found(run, searched)
    return searched


def summary(run: Run, searched: Done) -> dict[str, Any]:
    """What the flow returns; JSON values."""
    return {
        "recipe": run.config.name,
        "store": run.store.uri,
        "weights_from": searched.folder.rpartition("/")[2],
        "chosen": searched.result["chosen"],
        "values": searched.result["values"],
        "told": told(searched.result),
        "nothing_to_do": not searched.fresh,
    }

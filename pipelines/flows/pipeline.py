"""The whole chain: captioned images in, a registered text-to-image model out."""

from __future__ import annotations

from typing import Any

from prefect import flow

from pipelines.flows.form import (
    AS_RECIPE,
    Epochs,
    Protocol,
    Rate,
    RecipeName,
    Resolution,
    Seed,
    SourceName,
    Trials,
    Workers,
)
from pipelines.flows.notices import HOOKS, guarding
from pipelines.flows.opening import open_run, own_ray


@flow(name="sdn-pipeline", description=__doc__, **HOOKS)
@guarding
def pipeline(
    recipe: RecipeName = "openmoji",
    source: SourceName = AS_RECIPE,
    data_path: str = "",
    resolution: Resolution = 0,
    stage_one_epochs: Epochs = 0.0,
    stage_two_epochs: Epochs = 0.0,
    learning_rate: Rate = 0.0,
    search_trials: Trials = 0,
    protocol: Protocol = AS_RECIPE,
    seed: Seed = 0,
    workers: Workers = 0,
    store: str = "",
    weights_from: str = "",
    changes: list[str] = [],  # noqa: B006 (Prefect's form reads the default; it is never changed)
) -> dict[str, Any]:
    """Prepare, teacher, captions, stage one, search, stage two, evaluate, compare, register.

    Args:
        recipe: Named run to start from: openmoji is the embedded data set (11 minutes on 2 cores),
            tiny the same in three minutes without pictures to enjoy, folder your own images.
        source: Layout of the images in data_path.
        data_path: Where the images lie: a folder on the worker's machine, for some sources also
            s3://bucket/prefix. Empty for openmoji, which carries its own.
        resolution: Height and width of the images in pixels, a multiple of 32. 0: as the recipe
            says.
        stage_one_epochs: Passes over the training images in stage one. 0: as the recipe says.
        stage_two_epochs: Passes over the training images in stage two. 0: as the recipe says.
        learning_rate: Peak learning rate of both stages, below 1. 0: as the recipe says.
        search_trials: Trials of the search over loss weights; 1 searches nothing. 0: as the recipe
            says.
        protocol: Which captions are scored: one of each test image, every caption once (authors),
            or 30,000 as in the GAN papers. Scores of different protocols cannot be compared.
        seed: Initial weights and order of the images in all stages. 0: as the recipe says.
        workers: Training processes of each stage, a divisor of 48. 0: as the recipe says.
        store: Folder or s3://bucket/prefix for all results. Empty: the configured one.
        weights_from: Take the weights that an earlier search found, and search no more: an MLflow
            run, search-... of the store, or a weights.json. Empty: search as the recipe says.
        changes: Everything else, each key=value, such as stage_two.clip=1 (`sdn run --dry-run`
            lists the keys).

    Returns:
        What was done and where it lies; JSON values.
    """
    from pipelines.flows.chain import chain  # torch and MLflow, which a form has no need of

    run = open_run(
        recipe,
        store,
        changes,
        weights_from,
        source=source,
        data_path=data_path,
        resolution=resolution,
        stage_one_epochs=stage_one_epochs,
        stage_two_epochs=stage_two_epochs,
        learning_rate=learning_rate,
        search_trials=search_trials,
        protocol=protocol,
        seed=seed,
        workers=workers,
    )
    with own_ray(run.settings):
        return chain(run)

"""Retrain as data arrive: take what has landed, train on from the champion, promote if better."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from prefect import flow
from pydantic import Field

from pipelines.flows.form import Epochs, Rate, RecipeName
from pipelines.flows.notices import HOOKS, guarding
from pipelines.flows.opening import refused
from pipelines.flows.stages import Progress
from pipelines.ingesting import plain
from pipelines.run import RunSpec, parse_overrides


@flow(name="sdn-retrain", description=__doc__, **HOOKS)
@guarding
def retrain(
    landing: str = "",
    dataset: str = "",
    recipe: RecipeName = "folder",
    source: Literal["recipe", "folder", "parquet", "tars"] = "recipe",
    min_new: Annotated[int, Field(ge=1, le=1_000_000_000)] = 100,
    settle_s: Annotated[float, Field(ge=0, le=3600)] = 10.0,
    quiet_s: Annotated[float, Field(ge=0, le=3600)] = 60.0,
    epochs: Epochs = 0.0,
    rate: Rate = 0.0,
    store: str = "",
    changes: list[str] = [],  # noqa: B006 (Prefect's form reads the default; it is never changed)
) -> Any:
    """Look at the landing place, append what arrived, retrain from the champion if enough came.

    Args:
        landing: Folder or s3://bucket/prefix where data arrive; it is only ever read. Empty for the
            configured one (SDN_LANDING).
        dataset: Folder or s3://bucket/prefix of the data set that grows. Empty for the configured
            one (SDN_DATASET), else `landed` in the store.
        recipe: Named run: whose champion is trained on, and how a first model is trained.
        source: Layout of the landing place, for a first version of the data set; later ones are as
            it is. recipe is the recipe's own.
        min_new: Training samples that must have come since the champion's data before a retraining
            is worth it.
        settle_s: A file that changed within so many seconds is still being written, and left for
            the next look.
        quiet_s: Data must have stopped arriving for so many seconds before a retraining begins; 0
            waits for nothing.
        epochs: Passes of the retraining over the training split. 0: a quarter of the recipe's stage
            two.
        rate: Its learning rate, below 1. 0: three tenths of the recipe's.
        store: Folder or s3://bucket/prefix for all results; empty for the configured one.
        changes: Changes to the recipe, each key=value, such as promotion.level=0.05. A retraining
            heeds those about stage_two, evaluation, promotion, lanes, workers, threads and max_...;
            all others hold for a first model alone, and do nothing once there is a champion.

    Returns:
        A completed state whose name says what came of it: NoLandingPlace, UnderWay, NothingNew,
        Waiting, FirstModel, Promoted or Rejected; its data are JSON values.
    """
    # torch and MLflow, which a form has no need of
    from pipelines.flows.growing import Wanted, retrain_on

    with refused({"recipe": recipe, "store": store, "changes": changes}):
        run = RunSpec(recipe, parse_overrides(changes), store or None).open(Progress())
    wanted = Wanted(
        landing=landing or run.settings.landing or "",
        dataset=plain(dataset or run.settings.grown),
        source=source,
        min_new=min_new,
        settle_s=settle_s,
        quiet_s=quiet_s,
        epochs=epochs or None,
        rate=rate or None,
    )
    return retrain_on(run, wanted)

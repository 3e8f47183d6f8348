"""`sdn evaluate`: a model scored again, on the test split of the data it was trained for."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING, Any

from pipelines import evaluating, work
from pipelines.digests import folder_digest
from pipelines.evaluating import Champion, Model, no_champion
from pipelines.generation import find_model
from pipelines.points import read_points
from pipelines.preparing import first_letters
from pipelines.registry import (
    CHAMPION,
    DamagedModelError,
    RegistryError,
    find_version,
    model_folder,
)
from pipelines.release import PARENT
from pipelines.report import REPORT, SHEET, ReportParts, all_rows, how_measured, withheld
from pipelines.retraining import stages_of
from pipelines.run import RunSpec, perform
from pipelines.store import StoreError
from sdn.config import RunConfig, from_dict, with_overrides
from sdn.stage_run import CONFIG

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.generation import FoundModel
    from pipelines.run import Done, Job, Run


logger = logging.getLogger(__name__)


def score_model(
    model: str | None,
    store: str | None,
    overrides: dict[str, str],
    progress: Callable[[str, float, str], None] = lambda stage, share, text: None,
) -> dict[str, Any]:
    """Scores of a model on the test split of the data it was trained for, beside the champion.

    It trains no generator. What an evaluation found is kept in the store: asked again, it is told
    again. The report goes to MLflow where the model is registered.

    Args:
        model: as for `find_model`.
        store: in place of the configured one; holds the model's data set and teacher.
        overrides: changes to the config that the model was trained with, such as
            `evaluation.protocol`.
        progress: see `pipelines.run.Run.progress`.

    Raises:
        StoreError: the model's data or teacher are not in the store.
        RegistryError: no such model.
    """
    found = find_model(model, store)
    saved = json.loads((found.folder / CONFIG).read_text())
    config = with_overrides(from_dict(RunConfig, saved), overrides)
    run = RunSpec(config.name, store=store).open(progress)
    run = dataclasses.replace(run, config=config)
    inputs = _inputs(run, found)
    data, taught, encoder = (inputs[role] for role in ("data", "teacher", "captions"))
    inputs["reference"] = perform(run, evaluating.reference(run, data, taught))
    inputs["judge"] = perform(run, evaluating.judge(run, data, inputs["reference"]))
    models = {found.title: Model(digest=found.sha256, folder=found.folder)}
    scored = perform(run, evaluating.evaluate(run, inputs, models))
    stages = {"prepare": data, "teacher": taught, "captions": encoder, "evaluate": scored}
    stages |= {role: inputs[role] for role in ("reference", "judge")}
    curves = {found.title: found.folder} if list(read_points(found.folder)) else {}
    parts = ReportParts(curves=curves, stages=stages, letters=first_letters(run, data))
    champion = _champion(run, found)
    job = evaluating.compare(run, inputs, scored, found.folder, champion, parts)
    compared = perform(run, job)
    report = run.store.fetch(compared.folder) / REPORT
    _track(run, found, report, scored.key)
    rows = all_rows(scored.result, compared.result)
    return {
        "model": found.title,
        "captions": scored.result["captions"],
        "scores": rows,
        "how_measured": how_measured(scored.result["settings"]),
        "withheld": withheld(rows),
        "compared_with": compared.result["champion"],
        "decision": compared.result["decision"],
        "contact_sheet": str(run.store.fetch(scored.folder) / SHEET),
        "report": str(report),
    }


def _inputs(run: Run, found: FoundModel) -> dict[str, Done]:
    """Data, teacher and caption encoder of a model; a retrained one has those of its ancestors."""
    if found.version:
        title, uri = found.title, f"models:/{found.name}/{found.version}"
        tags = dict(find_version(run.settings, uri).tags)
        if PARENT in tags:
            made = stages_of(run.store, title, tags)
            return {"data": made["fixed"], "teacher": made["teacher"], "captions": made["captions"]}
    data = _already(run, work.prepare(run))
    taught = _already(run, work.teacher(run, data))
    encoder = _already(run, work.captions(run, data, taught))
    return {"data": data, "teacher": taught, "captions": encoder}


def _champion(run: Run, found: FoundModel) -> Champion:
    """The champion of the model's recipe, if there is one and it is not this very model."""
    name = found.name if found.version else f"sdn-{run.config.name}"
    settings = run.settings
    if settings.tracking_uri is None and not (settings.local / "mlflow.db").exists():
        return no_champion()
    try:
        folder, _, version = model_folder(settings, f"models:/{name}@{CHAMPION}")
    except DamagedModelError:
        raise
    except RegistryError as error:
        logger.warning("compared with untrained weights: %s", error)
        return no_champion()
    digest = folder_digest(folder)
    if digest == found.sha256:
        return no_champion()
    return Champion(title=f"version {version}", digest=digest, folder=lambda: folder)


def _track(run: Run, found: FoundModel, report: Path, key: str) -> None:
    """The report beside the model's run in MLflow, under the evaluation's key."""
    if not found.version:
        return
    from pipelines.tracking import Tracker, never_raising

    with never_raising("the report of the evaluation"):
        tracker = Tracker(run.settings, run.config.name)
        version = tracker.client.get_model_version(found.name, found.version)
        tracker.file(str(version.run_id), report, f"evaluations/{key[:16]}")


def _already(run: Run, job: Job) -> Done:
    """A stage that must be finished."""
    if run.store.done(job.stage.folder) is None:
        raise StoreError(
            f"the store {run.store.uri} has no {job.stage.folder}, which this model is scored "
            f"with: name the store of its run with --store, or make it with `sdn run "
            f"{run.config.name}`"
        )
    return perform(run, job)

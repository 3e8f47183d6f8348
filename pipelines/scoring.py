"""`sdn evaluate`: a model scored again, on the test split of the data it was trained for."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines import comparing, evaluating, work
from pipelines.comparing import Champion, no_champion
from pipelines.digests import folder_digest
from pipelines.evaluating import Model
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


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A model that is to be scored, and the run with whose config and store that is done."""

    found: FoundModel
    run: Run


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A model that was scored, and what it can be compared with others by."""

    scoring: Scoring
    inputs: dict[str, Done]
    """Role -> finished stage, see `pipelines.evaluating.evaluate`."""
    done: Done
    """The evaluation."""
    parts: ReportParts

    def against(self, champion: Champion, do: Callable[[Run, Job], Done] = perform) -> Done:
        """Compared with a champion on the same captions, with the report of both."""
        run, folder = self.scoring.run, self.scoring.found.folder
        job = comparing.compare(run, self.inputs, self.done, folder, champion, self.parts)
        return do(run, job)


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
    return beside_champion(open_scoring(model, store, overrides, progress))


def open_scoring(
    model: str | None,
    store: str | None,
    overrides: dict[str, str],
    progress: Callable[[str, float, str], None] = lambda stage, share, text: None,
) -> Scoring:
    """Find a model, its files checked, and resolve the config that it is scored with.

    Raises:
        RegistryError: no such model, or its files are not those registered.
        ValueError: overrides that cannot work.
    """
    found = find_model(model, store)
    saved = json.loads((found.folder / CONFIG).read_text())
    config = with_overrides(from_dict(RunConfig, saved), overrides)
    run = RunSpec(config.name, store=store).open(progress)
    return Scoring(found=found, run=dataclasses.replace(run, config=config))


def score(scoring: Scoring, do: Callable[[Run, Job], Done] = perform) -> Scored:
    """Score a model on the test split of the data it was trained for.

    Args:
        scoring: the model.
        do: does a stage.

    Raises:
        StoreError: the model's data or teacher are not in the store.
    """
    run, found = scoring.run, scoring.found
    inputs = inputs_of(run, found)
    data, taught, encoder = (inputs[role] for role in ("data", "teacher", "captions"))
    inputs["reference"] = do(run, evaluating.reference(run, data, taught))
    inputs["judge"] = do(run, evaluating.judge(run, data, inputs["reference"]))
    models = {found.title: Model(digest=found.sha256, folder=found.folder)}
    done = do(run, evaluating.evaluate(run, inputs, models))
    stages = {"prepare": data, "teacher": taught, "captions": encoder, "evaluate": done}
    stages |= {role: inputs[role] for role in ("reference", "judge")}
    curves = {found.title: found.folder} if list(read_points(found.folder)) else {}
    parts = ReportParts(curves=curves, stages=stages, letters=first_letters(run, data))
    return Scored(scoring=scoring, inputs=inputs, done=done, parts=parts)


def beside_champion(scoring: Scoring, do: Callable[[Run, Job], Done] = perform) -> dict[str, Any]:
    """Scores of a model, the champion's beside them; see `score_model`."""
    run, found = scoring.run, scoring.found
    scored = score(scoring, do)
    compared = scored.against(_champion(run, found), do)
    report = run.store.fetch(compared.folder) / REPORT
    page = _track(run, found, report, scored.done.key)
    rows = all_rows(scored.done.result, compared.result)
    return {
        "model": found.title,
        "captions": scored.done.result["captions"],
        "scores": rows,
        "how_measured": how_measured(scored.done.result["settings"]),
        "withheld": withheld(rows),
        "compared_with": compared.result["champion"],
        "decision": compared.result["decision"],
        "contact_sheet": str(run.store.fetch(scored.done.folder) / SHEET),
        "report": str(report),
        "page": page or report.as_uri(),
    }


def inputs_of(run: Run, found: FoundModel) -> dict[str, Done]:
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


def _track(run: Run, found: FoundModel, report: Path, key: str) -> str:
    """The report beside the model's run in MLflow, under the evaluation's key.

    Returns:
        Where MLflow's server shows it; "" where it does not.
    """
    if not found.version:
        return ""
    from pipelines.leaving_out import never_raising
    from pipelines.tracking import Tracker
    from pipelines.tracking_place import artifact_page

    with never_raising("the report of the evaluation"):
        tracker = Tracker(run.settings, run.config.name)
        version = tracker.client.get_model_version(found.name, found.version)
        place = f"evaluations/{key[:16]}"
        tracker.file(str(version.run_id), report, place)
        at = tracker.client.get_run(str(version.run_id)).info
        return artifact_page(run.settings, at.experiment_id, at.run_id, f"{place}/{REPORT}")
    return ""


def _already(run: Run, job: Job) -> Done:
    """A stage that must be finished."""
    if run.store.done(job.stage.folder) is None:
        raise StoreError(
            f"the store {run.store.uri} has no {job.stage.folder}, which this model is scored "
            f"with: name the store of its run with --store, or make it with `sdn run "
            f"{run.config.name}`"
        )
    return perform(run, job)

"""The stages of a retraining: a champion is trained on, and both are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect.runtime import flow_run

from pipelines import comparing, evaluating, newcomers, retraining
from pipelines.comparing import Champion
from pipelines.evaluating import Model
from pipelines.flows.chain import describe, distilled_from, tell
from pipelines.flows.stages import Tracked, do
from pipelines.preparing import first_letters, place
from pipelines.release import Origin, release
from pipelines.report import ReportParts
from pipelines.run import last_of
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from sdn.config import to_key
from sdn.data.manifest import read_versions

if TYPE_CHECKING:
    from typing import Any

    from pipelines.retraining import Parent
    from pipelines.run import Done, Run
    from sdn.data.manifest import Manifest


def train_and_decide(
    run: Run, parent: Parent, manifest: Manifest
) -> tuple[dict[str, Done], dict[str, Any]]:
    """The stages of a retraining, and what was registered."""
    tracker = Tracker(run.settings, run.config.name, flow_run.get_id() or "")
    data = do(run, retraining.data_job(run.config, manifest))
    key = Stage(
        name="retrain",
        config=to_key(run.config),
        inputs={"data": manifest.digest, "start": parent.start.key},
    ).key
    tracked = Tracked(tracker, f"{run.config.name} from version {parent.version}", key)
    with tracked.failing():
        describe(run, tracked, data)
        tracked.finished(data, run.store.files(data.folder))
        inputs = {"data": data, "teacher": parent.taught, "captions": parent.encoder}
        trained = distilled_from(run, tracked, inputs, parent.start)
        # What figures are comparable on: the test split that the champion was evaluated on.
        fixed = inputs | {"data": parent.fixed}
        fixed["reference"] = do(
            run, evaluating.reference(run, parent.fixed, parent.taught), tracked
        )
        fixed["judge"] = do(run, evaluating.judge(run, parent.fixed, fixed["reference"]), tracked)
        last = last_of(trained)
        model = Model(digest=last.key, folder=run.store.fetch(last.folder))
        scored = do(
            run, evaluating.evaluate(run, fixed, {last.name.replace("_", " "): model}), tracked
        )
        stages = {"prepare": data, "teacher": parent.taught, "captions": parent.encoder}
        stages |= {"reference": fixed["reference"], "judge": fixed["judge"]}
        stages |= trained | {"evaluate": scored}

        def compare(champion: Champion) -> Done:
            return compare_both(run, tracked, parent, stages, fixed, model, champion)

        origin = Origin(
            version=parent.version,
            start=parent.start,
            versions=frozenset(one.digest for one in _versions(run)),
        )
        registered = release(run, tracked, stages, compare, origin)
        tell(run, tracked, stages, registered)
    return stages, registered


def compare_both(
    run: Run,
    tracked: Tracked,
    parent: Parent,
    stages: dict[str, Done],
    fixed: dict[str, Done],
    model: Model,
    champion: Champion,
) -> Done:
    """The comparison on the fixed test split, in which the one on the new data has a say."""
    beside = None
    inputs = fixed | {"data": stages["prepare"]}
    job = newcomers.compare_on_new(run, inputs, parent.data, model, champion)
    if job is not None:
        stages["evaluate_new"] = do(run, job, tracked)
        beside = newcomers.with_a_say(stages["evaluate_new"], run.config.promotion.level)
    parts = ReportParts(
        curves={last_of(stages).name.replace("_", " "): model.folder},
        stages=stages,
        letters=first_letters(run, stages["prepare"]),
    )
    job = comparing.compare(run, fixed, stages["evaluate"], model.folder, champion, parts, beside)
    return do(run, job, tracked)


def _versions(run: Run) -> list[Manifest]:
    assert run.config.data.path is not None
    return read_versions(place(run.config.data.path, run.settings))

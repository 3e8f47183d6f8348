"""The stages of the whole chain in their order, and what a run tells of them."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from pipelines import comparing, evaluating, searching, work
from pipelines.comparing import Champion
from pipelines.evaluating import Model
from pipelines.flows.notices import tell_of_decision, tell_of_letters
from pipelines.flows.showing import (
    data_tables,
    report_page,
    show_data,
    show_dead_letters,
    show_result,
    show_search,
)
from pipelines.flows.stages import Tracked, do
from pipelines.leaving_out import never_raising
from pipelines.masking import masked_errors
from pipelines.preparing import data_uri, first_letters, letter_rows
from pipelines.release import example_caption, release
from pipelines.report import ReportParts
from pipelines.run import STUDENT_STAGES, Done, Run, last_of
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from pipelines.tracking_place import shown_uri
from sdn.config import to_dict, to_key
from sdn.data.dead_letters import TooManyDeadLetters
from sdn.space import with_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdn.config import RunConfig

T = TypeVar("T")


def chain(run: Run) -> dict[str, Any]:
    """The stages in their order; what they hand on are keys and folders."""
    began = time.monotonic()
    return on_data(run, lambda tracked, data: stages_after(run, tracked, data, began))


def on_data(run: Run, then: Callable[[Tracked, Done], T]) -> T:
    """Prepare the data set, show it, and go on in MLflow's runs of this config on it."""
    tracker = Tracker(run.settings, run.config.name, flow_run.get_id() or "")
    data = prepare(run, tracker)
    work.check_splits(run.config, data.result["samples"])
    tracked = Tracked(tracker, run.config.name, parent_key(run, data))
    with tracked.failing():
        show_data(run, data)
        describe(run, tracked, data)
        tracked.finished(data, run.store.files(data.folder))
        return then(tracked, data)


def stages_after(run: Run, tracked: Tracked, data: Done, began: float) -> dict[str, Any]:
    """The stages after the preparation, which MLflow's runs belong to."""
    taught = do(run, work.teacher(run, data), tracked)
    # Before anything long: whatever the evaluation lacks shows now.
    real = do(run, evaluating.reference(run, data, taught), tracked)
    judge = do(run, evaluating.judge(run, data, real), tracked)
    encoder = do(run, work.captions(run, data, taught), tracked)
    inputs = {"data": data, "teacher": taught, "captions": encoder}
    searched, trained = distilled(run, tracked, inputs, real)
    models = {
        name.replace("_", " "): Model(digest=done.key, folder=run.store.fetch(done.folder))
        for name, done in trained.items()
    }
    inputs |= {"reference": real, "judge": judge}
    scored = do(run, evaluating.evaluate(run, inputs, models), tracked)
    stages = {"prepare": data, "teacher": taught, "reference": real, "judge": judge}
    stages |= {"captions": encoder, "stage_one": trained.pop("stage_one"), "search": searched}
    stages |= trained | {"evaluate": scored}
    describe(run, tracked, data)  # where MLflow did not answer at the beginning

    def compare(champion: Champion) -> Done:
        parts = ReportParts(
            curves={name: model.folder for name, model in models.items()},
            stages=stages,
            letters=first_letters(run, data),
        )
        made = run.store.fetch(last_of(stages).folder)
        job = comparing.compare(run, inputs, scored, made, champion, parts)
        return do(run, job, tracked)

    registered = register(run, tracked, stages, compare)
    tell(run, tracked, stages, registered)
    show_result(run, stages, registered)
    return summary(run, stages, registered, time.monotonic() - began)


def distilled(
    run: Run, tracked: Tracked, inputs: dict[str, Done], real: Done
) -> tuple[Done, dict[str, Done]]:
    """The search, and the stages of the student with the values that it found."""
    searched, begun = searched_for(run, tracked, inputs, real)
    config = with_values(run.config, searched.result["values"])
    one = begun or do(run, work.distil(run, "stage_one", inputs, config), tracked)
    return searched, {"stage_one": one} | distilled_from(run, tracked, inputs, one, config)


def distilled_from(
    run: Run,
    tracked: Tracked,
    inputs: dict[str, Done],
    start: Done,
    config: RunConfig | None = None,
) -> dict[str, Done]:
    """The stages after stage one, each from the one before, the first of them from `start`."""
    config = run.config if config is None else config
    trained: dict[str, Done] = {}
    for name in STUDENT_STAGES[1:]:
        if name == "stage_three" and config.stage_three.epochs == 0:
            continue
        start = do(run, work.distil(run, name, inputs | {"start": start}, config), tracked)
        trained[name] = start
    return trained


def searched_for(
    run: Run, tracked: Tracked, inputs: dict[str, Done], real: Done
) -> tuple[Done, Done | None]:
    """The search, and the stage one that it starts from; None where its trials train their own."""
    judged = inputs | {"reference": real}
    begun = None
    if not (run.config.search.stage_one and run.config.search.trials > 1):
        begun = do(run, work.distil(run, "stage_one", inputs), tracked)
        judged |= {"start": begun}
    searched = do(run, searching.search(run, judged), tracked)
    show_search(searched)
    return searched, begun


@task(name="register", cache_policy=NO_CACHE, persist_result=False)
@masked_errors()
def register(
    run: Run, tracked: Tracked, stages: dict[str, Done], compare: Callable[[Champion], Done]
) -> dict[str, Any]:
    """The model becomes a version of the registry, once, and the champion if it is better."""
    return release(run, tracked, stages, compare)


def prepare(run: Run, tracker: Tracker) -> Done:
    """The data set; where too much of it cannot be used, that is shown before the run fails."""
    job = work.prepare(run)
    try:
        return do(run, job)
    except TooManyDeadLetters as error:
        show_dead_letters(letter_rows(error.letters), len(error.letters))
        tell_of_letters(run, error, flow_run.get_id())
        with never_raising("the dead letters"):
            failed = tracker.run("prepare", job.stage.key)
            tracker.table(failed, letter_rows(error.letters), "dead-letters.json")
            tracker.text(failed, str(error), "error.txt")
            tracker.finish(failed, "FAILED")
        raise


def describe(run: Run, tracked: Tracked, data: Done) -> None:
    """What MLflow's parent run is of: its config and its data; once."""
    if tracked.described:
        return
    with never_raising("config and data of the run"):
        tracker, config = tracked.tracker, to_dict(run.config)
        rows, letters = data_tables(run, data)
        tracker.log(
            tracked.parent, params=_flat(config), tags={"sdn.manifest": data.result["manifest"]}
        )
        tracker.text(tracked.parent, json.dumps(config, indent=2), "config.json")
        tracker.table(tracked.parent, rows, "data.json")
        if letters:
            tracker.table(tracked.parent, letters, "dead-letters.json")
        tracked.described = True


def tell(run: Run, tracked: Tracked, stages: dict[str, Done], registered: dict[str, Any]) -> None:
    """People are told what became of the version."""
    page = report_page(run, stages["compare"], registered)
    tell_of_decision(run, tracked, registered, stages["compare"], page)


def parent_key(run: Run, data: Done) -> str:
    """Key of MLflow's parent run of this config on this data."""
    inputs = {"data": data.result["manifest"]}
    return Stage(name="run", config=to_key(run.config), inputs=inputs).key


def summary(
    run: Run, stages: dict[str, Done], registered: dict[str, Any], total_s: float
) -> dict[str, Any]:
    """What the flow returns; JSON values."""
    from pipelines.report import REPORT, SHEET, all_rows, how_measured, withheld

    scored, compared = stages["evaluate"], stages["compare"]
    rows = all_rows(scored.result, compared.result)
    return {
        "recipe": run.config.name,
        "store": run.store.uri,
        "weights_from": run.spec.weights_from,
        "model": registered,
        "tracking_uri": shown_uri(run.settings),
        "example": example_caption(run.config, scored),
        "test_is": "unseen compositions"
        if run.config.data.source == "openmoji"
        else "test captions",
        "data_place": data_uri(run, stages["prepare"]),
        "store_option": f" --store {run.spec.store}" if run.spec.store else "",
        "headline": scored.result["headline"],
        "figures": scored.result["figures"],
        "captions": scored.result["captions"],
        "scores": rows,
        "how_measured": how_measured(scored.result["settings"]),
        "withheld": withheld(rows),
        "contact_sheet": str(run.store.fetch(scored.folder) / SHEET),
        "report": str(run.store.fetch(compared.folder) / REPORT),
        "seconds": round(total_s, 1),
        "fixed_s": round(total_s - sum(_computing_s(done) for done in stages.values()), 1),
        "nothing_to_do": not any(done.fresh for done in stages.values()),
        "stages": {
            name: {
                "key": done.key,
                "folder": done.folder,
                "seconds": done.seconds,
                "fresh": done.fresh,
                "note": _note(done, stages["search"]),
                "result": None if name in {"evaluate", "compare", "reference"} else done.result,
            }
            for name, done in stages.items()
        },
    }


def _note(done: Done, searched: Done) -> str:
    """Why a stage had no work to do; "" where it had."""
    if done.fresh:
        return ""
    full = [trial.get("full", {}) for trial in searched.result["trials"]]
    if searched.fresh and any(done.folder in one.get("stages", []) for one in full):
        return "done by the search"
    return "already done"


def _computing_s(done: Done) -> float:
    """What a stage of this run spent on its work, starts of Ray and tracking left out."""
    if not done.fresh:
        return 0.0
    return float(done.result.get("computing_s") or done.seconds)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found

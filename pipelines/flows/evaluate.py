"""Score a model on the test captions of its data, the champion beside it, in a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from pipelines.flows.form import AS_RECIPE, Protocol, changes_of
from pipelines.flows.notices import HOOKS, guarding
from pipelines.flows.opening import refused
from pipelines.flows.pulse import living
from pipelines.flows.showing import show_config, show_scores
from pipelines.flows.stages import Progress, do


@flow(name="sdn-evaluate", description=__doc__, **HOOKS)
@guarding
def evaluate(
    model: str = "",
    protocol: Protocol = AS_RECIPE,
    store: str = "",
    changes: list[str] = [],  # noqa: B006 (Prefect's form reads the default; it is never changed)
) -> dict[str, Any]:
    """Find the model, score it, compare it with the champion, show the report.

    Args:
        model: Such as models:/sdn-openmoji/3, or a folder. Empty: the champion registered last.
        protocol: Which captions are scored: one of each test image, every caption once (authors),
            or 30,000 as in the GAN papers. Scores of different protocols cannot be compared.
        store: Folder or s3://bucket/prefix with the model's data and the registry. Empty: the
            configured one.
        changes: Everything else, each key=value, such as evaluation.features=teacher.

    Returns:
        Scores and where the report is; JSON values.
    """
    from pipelines.scoring import (  # torch and MLflow, which a form has no need of
        beside_champion,
        open_scoring,
    )

    with refused({"model": model, "protocol": protocol, "store": store, "changes": changes}):
        overrides = changes_of({"protocol": protocol}, changes)
        scoring = open_scoring(model or None, store or None, overrides, Progress())
    show_config(scoring.run)
    with living(scoring.run.settings):
        found = beside_champion(scoring, do)
    show_scores(
        found["model"],
        f"Compared with {found['compared_with']}: {found['decision']['reason']}",
        rows=found["scores"],
        measured=found["how_measured"],
        sheet=Path(found["contact_sheet"]),
        page=found["page"],
    )
    return found

"""Make a version of the registry the champion, through the gate or, with a reason, over it."""

from __future__ import annotations

from typing import Any

from prefect import flow

from pipelines.flows.form import Version
from pipelines.flows.notices import HOOKS, guarding
from pipelines.flows.opening import refused
from pipelines.flows.pulse import living
from pipelines.flows.showing import show_config, show_decision
from pipelines.flows.stages import Progress, do


@flow(name="sdn-promote", description=__doc__, **HOOKS)
@guarding
def promote(
    *,
    model: str = "",
    version: Version,
    force: bool = False,
    reason: str = "",
    store: str = "",
) -> dict[str, Any]:
    """Check the version's files, compare it with the champion, let the better one be champion.

    Args:
        model: Registered model, such as sdn-openmoji. Empty: the one with the latest champion.
        version: Number of the version, as on MLflow's page.
        force: Make it the champion whatever the comparison says; needs a reason.
        reason: Why; kept in the log of champions and as a tag of the version.
        store: Folder or s3://bucket/prefix with the model's data and the registry. Empty: the
            configured one.

    Returns:
        What was decided; JSON values, see `pipelines.promoting.promote`.
    """
    # torch and MLflow, which a form has no need of
    from pipelines.promoting import check_reason, open_promotion
    from pipelines.promoting import promote as promote_version

    asked = {"model": model, "version": version, "force": force, "reason": reason, "store": store}
    with refused(asked):
        check_reason(reason, force=force)
        scoring = open_promotion(model, version, store or None, Progress())
    show_config(scoring.run)
    with living(scoring.run.settings):
        found = promote_version(scoring, force=force, reason=reason, do=do)
    show_decision(found, found["compared_with"] or "nothing")
    return found

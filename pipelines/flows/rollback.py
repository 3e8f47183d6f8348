"""Roll back: the version that was champion before becomes champion again."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from pipelines.flows.notices import HOOKS, guarding
from pipelines.flows.opening import refused
from pipelines.flows.pulse import living
from pipelines.flows.showing import show_asked
from pipelines.leaving_out import never_raising
from pipelines.settings import Settings


@flow(name="sdn-rollback", description=__doc__, **HOOKS)
@guarding
def rollback(model: str = "", reason: str = "", store: str = "") -> dict[str, Any]:
    """Check the files of the champion before, make it the champion again, say so.

    Args:
        model: Registered model, such as sdn-openmoji. Empty: the one with the latest champion.
        reason: Why; kept in the log of champions and on the version that is rolled back from.
        store: Folder or s3://bucket/prefix with the registry. Empty: the configured one.

    Returns:
        What was done; JSON values, see `pipelines.rolling_back.roll_back`.
    """
    # MLflow, which a form has no need of
    from pipelines.rolling_back import registered_name, roll_back

    settings = Settings(store=store) if store else Settings()
    with refused({"model": model, "reason": reason, "store": settings.store}):
        name = registered_name(settings, model)
    show_asked({"model": name, "reason": reason, "store": settings.store})
    with living(settings):
        found = roll_back(settings, name, reason)
    show(found)
    return found


def show(found: dict[str, Any]) -> None:
    """Before and after as a Prefect artifact."""
    checked = found["sha256"] or "not known: registered before digests were kept"
    lines = [
        f"# {found['name']}: version {found['before']} → version {found['after']}",
        "",
        "| | |",
        "|---|---|",
        f"| champion before | version {found['before']} |",
        f"| champion now | version {found['after']} |",
        f"| term | {found['term']} |",
        f"| reason | {found['reason'].replace('|', chr(92) + '|')} |",
        f"| SHA-256 of its files | {checked} |",
        f"| seconds | {found['seconds']} |",
        "",
        "Run this once more to undo it.",
    ]
    with never_raising("Prefect's artifact of the rollback"):
        create_markdown_artifact("\n".join(lines), key="rollback")

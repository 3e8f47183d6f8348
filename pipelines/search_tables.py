"""The search for readers: a row a trial, and the choice in a few sentences."""

from __future__ import annotations

from typing import Any


def search_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row a trial, the one whose values were taken marked.

    Args:
        result: of the search's stage.
    """
    score = result["score"]
    rows = []
    for trial in result["trials"]:
        full = trial.get("full", {})
        rows.append(
            {
                "trial": f"{trial['number']}{' (own)' if trial['number'] == 0 else ''}"
                + (" *" if trial["number"] == result["chosen"] else ""),
                "state": trial["state"],
                "images": f"{trial['points'][-1]['images_seen']:,}" if trial["points"] else "0",
                score: _scored(trial["points"][-1] if trial["points"] else {}),
                "p": f"{trial['p_value']:.2g}" if "p_value" in trial else "",
                f"{score} at full length": _scored(full),
                "p at full length": f"{full['p_value']:.2g}" if "p_value" in full else "",
                **{name: f"{value:.3g}" for name, value in trial["values"].items()},
                "why": trial["reason"] or "",
            }
        )
    return rows


def told(result: dict[str, Any]) -> str:
    """What was found, why, and whether short trials tell the truth."""
    chosen = result["chosen"]
    who = (
        "the recipe's own values stay" if chosen == 0 else f"the values of trial {chosen} are taken"
    )
    found = result["rank_correlation"]
    if "value" in found:
        truth = (
            f"Spearman's correlation of short and full-length scores over {found['trials']} "
            f"trials: {found['value']:+.2f} (p = {found['p_value']:.2g})"
        )
    else:
        truth = f"no correlation of short and full-length scores: {found['withheld']}"
    return f"{who}: {result['reason']}. {truth}."


def _scored(found: dict[str, Any]) -> str:
    if found.get("value") is None:
        return ""
    return f"{found['value']:.4g} ({found['low']:.4g} to {found['high']:.4g})"

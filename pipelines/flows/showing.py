"""What a flow shows of itself on Prefect's page: its config first, its data, search and result."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from pipelines.flows.form import AS_RECIPE
from pipelines.leaving_out import never_raising
from pipelines.masking import masked
from pipelines.preparing import first_letters
from pipelines.search_tables import search_rows, told
from pipelines.tracking_place import artifact_page
from sdn.config import to_dict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipelines.run import Done, Run


def show_config(run: Run) -> None:
    """The resolved config, the first artifact of a run."""
    text = json.dumps(to_dict(run.config), indent=2)
    with never_raising("Prefect's artifact of the config"):
        create_markdown_artifact(
            f"```json\n{text}\n```\n\nStore: `{run.store.uri}`", key="resolved-config"
        )


def show_asked(resolved: dict[str, Any]) -> None:
    """What a flow without a config of a run works with, its first artifact."""
    with never_raising("Prefect's artifact of the config"):
        create_markdown_artifact(
            f"```json\n{json.dumps(resolved, indent=2)}\n```", key="resolved-config"
        )


def show_refusal(asked: dict[str, Any], why: str) -> None:
    """What was asked for and why it cannot be done, where the resolved config would stand."""
    given = {name: value for name, value in asked.items() if value not in ("", 0, [], AS_RECIPE)}
    text = masked(json.dumps(given, indent=2, default=str))
    with never_raising("Prefect's artifact of the refusal"):
        create_markdown_artifact(
            f"**This cannot be run:** {masked(why)}\n\nAsked for:\n\n```json\n{text}\n```",
            key="resolved-config",
        )


def show_data(run: Run, data: Done) -> None:
    """What the data set holds, and its dead letters, in Prefect."""
    rows, letters = data_tables(run, data)
    with never_raising("Prefect's table of the data"):
        manifest = data.result["manifest"]
        create_table_artifact(rows, key="data", description=f"Manifest {manifest}")
    show_dead_letters(letters, data.result["dead_letters"])


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


def show_found(run: Run, searched: Done) -> None:
    """How what a search has found is used in a run of the whole chain."""
    name = searched.folder.rpartition("/")[2]
    values = json.dumps(searched.result["values"], indent=2)
    lines = [
        f"# {name}",
        told(searched.result),
        "",
        "To train with these values and search no more, start `sdn-pipeline` with the same recipe "
        f"and store, and `{name}` as `weights_from`; or on the command line:",
        "",
        f"```sh\nsdn run {run.config.name} --store {run.store.uri} --weights-from {name}\n```",
        "",
        f"```json\n{values}\n```",
    ]
    with never_raising("Prefect's artifact of what was found"):
        create_markdown_artifact("\n".join(lines), key="weights")


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


def show_result(run: Run, stages: dict[str, Done], registered: dict[str, Any]) -> None:
    """Scores, contact sheet, the decision and the way to the report, as artifacts in Prefect."""
    from pipelines.report import SHEET, all_rows, how_measured

    scored, compared = stages["evaluate"], stages["compare"]
    show_scores(
        f"{registered['name']} version {registered['version']}",
        f"**{'Champion' if registered['champion'] else 'Not promoted'}**: {registered['reason']}",
        rows=all_rows(scored.result, compared.result),
        measured=how_measured(scored.result["settings"]),
        sheet=run.store.fetch(scored.folder) / SHEET,
        page=report_page(run, compared, registered),
    )
    show_decision(registered, compared.result["champion"])


def report_page(run: Run, compared: Done, registered: dict[str, Any]) -> str:
    """Where the report is to be read: MLflow's page where that is a server, else the file."""
    from pipelines.report import REPORT

    experiment, number = registered["run"]
    page = artifact_page(run.settings, experiment, number, REPORT)
    return page or (run.store.fetch(compared.folder) / REPORT).as_uri()


def show_scores(
    title: str,
    verdict: str,
    *,
    rows: Mapping[str, dict[str, dict[str, Any]]],
    measured: str,
    sheet: Path,
    page: str,
) -> None:
    """A table of scores, the contact sheet and the way to the report.

    Args:
        title: the model.
        verdict: what became of it.
        rows: of `pipelines.report.all_rows`.
        measured: how, in a sentence.
        sheet: the contact sheet, PNG.
        page: address of the report.
    """
    from pipelines.report import REPORT, headings, table_rows

    picture = base64.b64encode(sheet.read_bytes()).decode()
    columns = headings(rows)
    lines = [
        f"# {title}",
        verdict,
        "",
        f"[Report]({page})",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in table_rows(rows)),
        "",
        measured,
        "",
        f"![contact sheet](data:image/png;base64,{picture})",
    ]
    with never_raising("Prefect's artifact of the result"):
        create_markdown_artifact("\n".join(lines), key="result")
        create_link_artifact(page, key="report", link_text=REPORT)


def show_decision(registered: dict[str, Any], compared_with: str) -> None:
    """The decision about a version with its numbers.

    Args:
        registered: `name`, `version`, `champion`, `reason` and `decision`.
        compared_with: for people.
    """
    told = "champion" if registered["champion"] else "not promoted"
    lines = [
        f"# {registered['name']} version {registered['version']}: {told}",
        f"Compared with {compared_with}. {registered['reason']}",
        "```json",
        json.dumps(registered["decision"], indent=2),
        "```",
    ]
    with never_raising("Prefect's artifact of the decision"):
        create_markdown_artifact("\n".join(lines), key="decision")

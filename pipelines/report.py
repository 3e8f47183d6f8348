"""Scores, contact sheet and the self-contained report of an evaluation."""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING, Any

from pipelines.points import read_points
from pipelines.preparing import data_set
from sdn.captions import normalise
from sdn.config import to_dict
from sdn.evaluation import evaluate
from sdn.sheets import contact_sheet
from sdn.stage_run import StageInputs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from pipelines.run import Done, Run
    from pipelines.stage import Stage

SHEET, SCORES, REPORT = "contact-sheet.png", "scores.json", "report.html"

COLUMNS = {
    "pixels/top1_score": "top 1, pixels",
    "pixels/top5_score": "top 5, pixels",
    "pixels/median_rank": "median rank",
    "teacher/top1_score": "top 1, teacher",
    "teacher/top5_score": "top 5, teacher",
    "kernel_distance": "KID x1000, teacher",
}
"""Score -> heading, in the order of the tables that people read."""
SHORT = tuple(score for score in COLUMNS if score != "teacher/top5_score")
"""What a terminal of 80 columns has room for."""


def write_evaluation(
    run: Run, folder: Path, inputs: dict[str, Done], models: dict[str, Done], stage: Stage
) -> dict[str, Any]:
    """Evaluate and write `scores.json`, `contact-sheet.png` and `report.html` into `folder`.

    Returns:
        `scores` (row -> score -> value), `headline` (top 1 of the last model in pixels),
        `captions` (number of them).
    """
    local = {role: run.store.fetch(done.folder) for role, done in inputs.items() if role != "data"}
    found = evaluate(
        run.config,
        StageInputs(data=data_set(run, inputs["data"]), **local),
        {name.replace("_", " "): run.store.fetch(done.folder) for name, done in models.items()},
        report=lambda row: run.progress("evaluate", 0.0, row),
    )
    rows = min(run.config.evaluation.sheet, len(found.captions))
    # Spread over the split, so that one concept does not fill the sheet.
    chosen = [i * len(found.captions) // rows for i in range(rows)]
    shown = {n: p[chosen] for n, p in found.images.items() if n != "untrained weights"}
    credit = inputs["data"].result["attribution"]
    footer = f"Left column ('real'): {credit}" if credit else None
    sheet = contact_sheet(shown, [found.captions[i] for i in chosen], footer=footer)
    sheet.save(folder / SHEET)
    last = list(models)[-1].replace("_", " ")
    result = {
        "scores": found.scores,
        "model": last,
        "headline": found.scores[last]["pixels/top1_score"],
        "captions": len(found.captions),
        "example": _example(found.captions, run.config.captions.max_chars),
    }
    (folder / SCORES).write_text(json.dumps(result, indent=2))
    curves = {name: run.store.fetch(done.folder) for name, done in models.items()}
    (folder / REPORT).write_text(
        _html(run, result, folder / SHEET, curves, inputs | models, credit, stage), encoding="utf-8"
    )
    return result


def _example(captions: Sequence[str], max_chars: int) -> str:
    """A caption that generation takes: the first short enough, else the beginning of the first."""
    short = (caption for caption in captions if len(normalise(caption)) <= max_chars)
    return next(short, captions[0][: max_chars // 2])


def table_rows(scores: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(row, cells) of the table of scores: shares as percentages, top 1 with its interval."""
    return [(name, [_cell(found, score) for score in COLUMNS]) for name, found in scores.items()]


def short_rows(scores: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """As `table_rows`, for a terminal: fewer columns, and only the headline has its interval."""
    return [
        (
            name,
            [
                cell if score == "pixels/top1_score" else cell.split(" ", maxsplit=1)[0]
                for score in SHORT
                for cell in (_cell(found, score),)
            ],
        )
        for name, found in scores.items()
    ]


def _cell(found: dict[str, Any], score: str) -> str:
    if score not in found:
        return ""
    value = found[score]
    if score == "kernel_distance":
        return f"{1000 * value:.2f} ± {1000 * found['kernel_distance_std']:.2f}"
    if score.endswith("median_rank"):
        return f"{value:g}"
    if score.endswith("top1_score"):
        space = score.split("/", maxsplit=1)[0]
        low, high = found[f"{space}/top1_low"], found[f"{space}/top1_high"]
        return f"{value:.1%} ({100 * low:.0f}-{100 * high:.0f})"
    return f"{value:.1%}"


def _html(
    run: Run,
    result: dict[str, Any],
    sheet: Path,
    curves: dict[str, Path],
    stages: dict[str, Done],
    credit: str | None,
    stage: Stage,
) -> str:
    from jinja2 import Environment, PackageLoader

    # Captions and config values are the user's text: everything is escaped.
    environment = Environment(loader=PackageLoader("pipelines"), autoescape=True)
    return environment.get_template("report.html").render(
        recipe=run.config.name,
        result=result,
        headings=list(COLUMNS.values()),
        rows=table_rows(result["scores"]),
        sheet=base64.b64encode(sheet.read_bytes()).decode(),
        curves={name: _curves_png(name, folder) for name, folder in curves.items()},
        lineage={name: (done.key, done.folder) for name, done in stages.items()}
        | {"evaluate": (stage.key, stage.folder)},
        data=stages["data"].result,
        config=json.dumps(to_dict(run.config), indent=2),
        credit=credit,
    )


def _curves_png(name: str, folder: Path) -> str:
    """The loss terms of a stage over images seen, base64 of a PNG; empty without points."""
    points = list(read_points(folder))
    if not points:
        return ""
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    seen = [point["images_seen"] for point in points]
    for term in points[0]["losses"]:
        wide = 2.5 if term == "loss/total" else 0.8
        axes.plot(seen, [p["losses"][term] for p in points], label=term, linewidth=wide)
    axes.set(
        yscale="log", xlabel="images seen", ylabel="weighted loss", title=name.replace("_", " ")
    )
    axes.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()

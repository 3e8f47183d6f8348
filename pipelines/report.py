"""The self-contained report of an evaluation, and how scores are written for people."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.comparing import CHAMPION_SHEET
from pipelines.evaluating import EXTREMES, SCORES, SHEET
from pipelines.points import read_points
from sdn.config import to_dict
from sdn.evaluation import NOISE_APART, REAL, REAL_APART, UNTRAINED
from sdn.space import with_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from pipelines.run import Done, Run
    from sdn.config import RunConfig

__all__ = ["CHAMPION_SHEET", "EXTREMES", "REPORT", "SCORES", "SHEET"]

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A score in tables: its heading, and whether it is a share, shown as a percentage."""

    heading: str
    share: bool = False


COLUMNS = {
    "r_precision_score": Column(heading="caption match", share=True),
    "kid_error": Column(heading="KID"),
    "fid_error": Column(heading="FID"),
    "inception_score": Column(heading="Inception Score"),
    "precision_score": Column(heading="precision", share=True),
    "recall_score": Column(heading="recall", share=True),
    "diversity_score": Column(heading="diversity"),
    "caption_diversity_score": Column(heading="diversity, one caption"),
    "pixels/top1_score": Column(heading="top 1, pixels", share=True),
    "pixels/top5_score": Column(heading="top 5, pixels", share=True),
    "pixels/median_rank": Column(heading="median rank"),
    "features/top1_score": Column(heading="top 1, features", share=True),
    "features/top5_score": Column(heading="top 5, features", share=True),
}
"""Score -> column, in the order of the tables that people read."""
SHORT = (
    "r_precision_score",
    "kid_error",
    "pixels/top1_score",
    "pixels/top5_score",
    "pixels/median_rank",
)
"""What a terminal of 80 columns has room for."""

Scores = dict[str, dict[str, Any]]
"""Score name -> `sdn.scores.score.Score.as_dict()`."""


@dataclass(frozen=True, kw_only=True)
class ReportParts:
    """What a report shows beside the scores."""

    curves: Mapping[str, Path]
    """Stage -> its folder, with the points of its training."""
    stages: Mapping[str, Done]
    """All finished stages, for lineage."""
    letters: list[dict[str, str]]
    """First dead letters: key, where, reason."""


def all_rows(scored: Mapping[str, Any], champion: Mapping[str, Any] | None) -> dict[str, Scores]:
    """Every row of the table of scores: models, champion, floors, ceiling, baselines.

    Args:
        scored: result of an evaluation.
        champion: result of a comparison, or None.
    """
    scores: dict[str, Scores] = scored["scores"]
    models = list(scored["figures"])
    rows = {name: scores[name] for name in models}
    if champion is not None and champion["champion"] != UNTRAINED:
        rows[f"champion: {champion['champion']}"] = champion["champion_scores"]
    rows |= {
        f"{name} (floor, {found['kid_error']['count']:,} images)": found
        for name, found in scored["floors"].items()
    }
    rows[REAL] = scores[REAL]
    rows[f"{UNTRAINED} (ceiling)"] = scores[UNTRAINED]
    rest = {name: found for name, found in scores.items() if name not in {*models, REAL, UNTRAINED}}
    return rows | rest


def _told(rows: Mapping[str, Scores]) -> list[str]:
    """The scores that a table has columns of: those that any row has."""
    return [score for score in COLUMNS if any(score in found for found in rows.values())]


def headings(rows: Mapping[str, Scores]) -> list[str]:
    """Of the columns of `table_rows`."""
    return [COLUMNS[score].heading for score in _told(rows)]


def table_rows(rows: Mapping[str, Scores]) -> list[tuple[str, list[str]]]:
    """(row, cells) with intervals, for reports."""
    told = _told(rows)
    return [(name, [cell(found, score) for score in told]) for name, found in rows.items()]


def short_rows(rows: Mapping[str, Scores]) -> list[tuple[str, list[str]]]:
    """As `table_rows`, for a terminal: fewer columns, intervals of the first three."""
    return [
        (name, [cell(found, score, bare=n > 2) for n, score in enumerate(SHORT)])
        for name, found in rows.items()
    ]


def cell(found: Scores, score: str, *, bare: bool = False) -> str:
    """One score with its interval; empty where it was not asked for."""
    one = found.get(score)
    if one is None:
        return ""
    if one.get("value") is None:
        return "withheld"
    share = COLUMNS[score].share
    value = f"{one['value']:.1%}" if share else plain(one["value"])
    if bare or one.get("low") is None:
        return value
    low, high = (f"{100 * one[k]:.0f}" if share else plain(one[k]) for k in ("low", "high"))
    return f"{value} ({low} to {high})"


def plain(value: float) -> str:
    """Three digits, and all of them before the point: a rank of 1823 is not 1.82e+03."""
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def withheld(rows: Mapping[str, Scores]) -> list[str]:
    """Why scores are withheld, each reason once, with the rows that it holds for."""
    without: dict[tuple[str, str], list[str]] = {}
    for row, found in rows.items():
        for score, one in found.items():
            if score in COLUMNS and one.get("withheld"):
                without.setdefault((COLUMNS[score].heading, one["withheld"]), []).append(row)
    return [
        f"{heading} ({', '.join(named)}): {reason}" for (heading, reason), named in without.items()
    ]


def how_measured(settings: Mapping[str, Any]) -> str:
    """What every score is of, in one sentence."""
    features, real = settings["features"], settings["reference"]
    size, scale = features["input_px"], settings.get("noise_scale")
    noise = f", drawn with {scale:g} times the noise of training" if scale not in (None, 1) else ""
    seen = f"{size} px ({features['resize']})" if isinstance(size, int) else size
    return (
        f"Protocol {settings['protocol']}: {settings['images']:,} images of "
        f"{settings['image_px']} px{noise}, for {settings['different_images']:,} true images; "
        f"features: {features['network']} "
        f"(SHA-256 {features['sha256'][:12]}), {features['dim']} numbers, input {seen}; reference: "
        f"{real['images']:,} test images (SHA-256 {real['sha256'][:12]}). Intervals are of 95%."
    )


def write_report(
    run: Run,
    folder: Path,
    scored: Done,
    compared: Mapping[str, Any],
    parts: ReportParts,
) -> None:
    """Write `report.html` into `folder`, complete in itself.

    Args:
        run: the run.
        folder: of the comparison, which holds the champion's sheet.
        scored: the finished evaluation.
        compared: result of the comparison.
        parts: what is shown beside the scores.
    """
    from jinja2 import Environment, PackageLoader

    evaluated = run.store.fetch(scored.folder)
    rows = all_rows(scored.result, compared)
    champion = folder / CHAMPION_SHEET
    # Captions, labels and config values are the user's text: everything is escaped.
    environment = Environment(loader=PackageLoader("pipelines"), autoescape=True)
    text = environment.get_template("report.html").render(
        recipe=run.config.name,
        result=scored.result,
        how=how_measured(scored.result["settings"]),
        figures=_figures(scored.result, compared),
        headings=headings(rows),
        rows=table_rows(rows),
        withheld=withheld(rows),
        intervals=_intervals(rows),
        decision=compared["decision"],
        champion=compared["champion"],
        champion_sheet=_picture(champion) if champion.is_file() else None,
        sheet=_picture(evaluated / SHEET),
        extremes=_extremes(scored.result["extremes"], evaluated / EXTREMES),
        classes=scored.result["classes"],
        spread={label: spread(lines) for label, lines in scored.result["classes"].items()},
        apart=(REAL_APART, NOISE_APART),
        curves={name: _curves_png(name, place) for name, place in parts.curves.items()},
        lineage={name: (done.key, done.folder) for name, done in parts.stages.items()},
        data=parts.stages["prepare"].result,
        letters=parts.letters,
        config=json.dumps(to_dict(_trained_with(run.config, parts.stages)), indent=2),
        credit=parts.stages["prepare"].result["attribution"],
    )
    (folder / REPORT).write_text(text, encoding="utf-8")


def spread(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """In how many classes noise moves images at least half as far as real ones lie apart.

    Args:
        lines: a table of classes as of `sdn.evaluation.class_table`.

    Returns:
        A sentence; None where the model has no noise or no class enough real images.
    """
    real, own = REAL_APART, NOISE_APART
    # Images without the label are no class.
    told = [one for one in lines if one["class"] and one.get(real) and one.get(own) is not None]
    if not told:
        return None
    wide = sum(line[own] >= line[real] / 2 for line in told)
    images = sum(line["images"] for line in told)
    means = [sum(line[name] * line["images"] for line in told) / images for name in (own, real)]
    return (
        f"Two images of one caption lie at least half as far apart as two real images of its class "
        f"in {wide} of {len(told)} classes; mean over the images: {means[0]:.3g} and "
        f"{means[1]:.3g}."
    )


def _trained_with(config: RunConfig, stages: Mapping[str, Done]) -> RunConfig:
    """The config with the values that a search has found, where one did."""
    searched = stages.get("search")
    return config if searched is None else with_values(config, searched.result["values"])


def _figures(result: Mapping[str, Any], compared: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(row, caption match, KID): what stands first, floor and ceiling beside it."""
    rows = {name: result["scores"][name] for name in result["figures"]}
    if compared["champion"] != UNTRAINED:
        rows[f"champion: {compared['champion']}"] = compared["champion_scores"]
    rows["real images (KID: halves of the test split)"] = _real_figures(result)
    rows[UNTRAINED] = result["scores"][UNTRAINED]
    return [
        (name, cell(found, "r_precision_score"), cell(found, "kid_error"))
        for name, found in rows.items()
    ]


def _real_figures(result: Mapping[str, Any]) -> Scores:
    floors = list(result["floors"].values())
    kid = {"kid_error": floors[0]["kid_error"]} if floors else {}
    return {"r_precision_score": result["scores"][REAL]["r_precision_score"], **kid}


def _intervals(rows: Mapping[str, Scores]) -> list[str]:
    """How each score's interval was come by, once."""
    said = {
        COLUMNS[score].heading: one["interval"]
        for found in rows.values()
        for score, one in found.items()
        if score in COLUMNS and one.get("interval")
    }
    return [f"{heading}: {how}" for heading, how in said.items()]


def _extremes(listed: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """As the evaluation lists them, with each picture in base64."""
    return [
        {**one, "pictures": {k: _picture(folder / name) for k, name in one["files"].items()}}
        for one in listed
    ]


def _picture(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


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

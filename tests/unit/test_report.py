"""How scores are written for people, and that nobody's text becomes markup."""

from __future__ import annotations

import json

import pytest
import torch

from pipelines.evaluating import EXTREMES, SHEET
from pipelines.report import (
    REPORT,
    ReportParts,
    all_rows,
    cell,
    how_measured,
    plain,
    short_rows,
    spread,
    withheld,
    write_report,
)
from pipelines.run import Done, RunSpec
from sdn.evaluation import NOISE_APART, REAL, REAL_APART, UNTRAINED
from sdn.promotion import decide
from sdn.recipes import recipe
from sdn.sampling import encode_png
from sdn.scores.paired import paired_shares

MARKUP = '<script>alert("1")</script> & <b>red</b> bird'
SHARE = {"value": 0.5, "low": 0.25, "high": 0.75, "interval": "Wilson", "count": 8}
KID = {"value": 0.01234, "low": 0.01, "high": 0.015, "interval": "jackknife", "count": 8}
WITHHELD = {"withheld": "too few", "count": 8}


def result():
    """What an evaluation's stage says, with markup wherever a person's text goes."""
    scores = {"r_precision_score": SHARE, "kid_error": KID, "fid_error": WITHHELD}
    return {
        "scores": {"stage one": scores, "stage two": scores, UNTRAINED: scores,
                   REAL: {"r_precision_score": SHARE}, "blurred": {"pixels/top1_score": SHARE}},
        "floors": {"real: halves": {"kid_error": KID}},
        "figures": {"stage one": {}, "stage two": {}},
        "classes": {MARKUP: [{"class": MARKUP, "images": 8, "caption match": None, "top 1": 0.5,
                              "top 5": 1.0}]},
        "settings": {
            "protocol": "each-image", "images": 8, "different_images": 8, "image_px": 64,
            "features": {"network": "lite0", "sha256": "a" * 64, "input_px": 128,
                         "resize": "bicubic", "dim": 1280},
            "reference": {"images": 8, "sha256": "b" * 64},
        },
        "extremes": [{"caption": MARKUP, "key": "k", "ranks": {"pixels": 1, "features": 2},
                      "found": True, "best": True, "files": {"real": "00-0.png"}}],
        "model": "stage two",
        "captions": 8,
    }  # fmt: skip


@pytest.fixture
def report(tmp_path):
    """The text of a report of `result()`."""
    run = RunSpec("tiny", store=str(tmp_path)).open()
    folder = tmp_path / "stages" / "evaluate-x"
    (folder / EXTREMES).mkdir(parents=True)
    picture = encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8))
    for name in (SHEET, f"{EXTREMES}/00-0.png"):
        (folder / name).write_bytes(picture)
    (folder / "done.json").write_text("{}")
    values = {"manifest": "m", "samples": {"test": 8}, "exclusions": {MARKUP: 1}, "duplicates": {},
              "dead_letters": 1, "attribution": MARKUP}  # fmt: skip
    data = Done(name="prepare", key="k", folder="f", result=values, seconds=1, fresh=True)
    scored = Done(name="evaluate", key="k", folder="stages/evaluate-x", result=result(), seconds=1,
                  fresh=True)  # fmt: skip
    gain = paired_shares(torch.zeros(50), torch.ones(50))
    decision = decide(gain, None, recipe("tiny").promotion, MARKUP)
    compared = {"champion": UNTRAINED, "champion_scores": {}, "decision": decision.as_dict()}
    letters = [{"key": MARKUP, "where": MARKUP, "reason": MARKUP}]
    parts = ReportParts(curves={}, stages={"prepare": data, "evaluate": scored}, letters=letters)
    write_report(run, tmp_path, scored, compared, parts)
    return (tmp_path / REPORT).read_text(encoding="utf-8")


def test_text_of_people_is_never_markup(report):
    """Captions, classes, dead letters, exclusions, credit and reasons are shown as they are."""
    assert "<script" not in report
    assert "<b>red" not in report
    assert report.count("&lt;script&gt;") >= 8


def test_the_two_figures_stand_first(report):
    """Caption match and KID of both stages come before everything else."""
    first = report.index("<table")
    assert report.index("caption match", first) < report.index("<h2>Scores")
    assert first < report.index("stage one") < report.index("stage two") < report.index("<h2>")


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"r_precision_score": SHARE}, "50.0% (25 to 75)"),
        ({"r_precision_score": WITHHELD}, "withheld"),
        ({}, ""),
    ],
)
def test_a_share_is_shown_as_a_percentage_with_its_interval(found, text):
    """A score that is withheld says so, one that was not asked for is empty."""
    assert cell(found, "r_precision_score") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1823.4, "1,823"),
        (1000.0, "1,000"),
        (999.5, "1,000"),
        (999.4, "999"),
        (869.2, "869"),
        (30.0, "30"),
        (0.00533, "0.00533"),
        (0.000051234, "0.0000512"),
        (0.0, "0"),
        (-1.5, "-1.5"),
    ],
)
def test_a_number_is_told_in_three_digits_and_never_by_an_exponent(value, text):
    """Ranks go into the thousands."""
    assert plain(value) == text


def test_rows_are_named_for_what_they_are():
    """Floors and ceiling are marked; the champion has a row where there is one."""
    compared = {"champion": "version 3", "champion_scores": {"kid_error": KID}}
    rows = all_rows(result(), compared)
    assert list(rows) == [
        "stage one", "stage two", "champion: version 3", "real: halves (floor, 8 images)", REAL,
        f"{UNTRAINED} (ceiling)", "blurred",
    ]  # fmt: skip
    assert withheld(rows) == [f"FID (stage one, stage two, {UNTRAINED} (ceiling)): too few"]
    assert dict(short_rows(rows))["stage two"][1] == "0.0123 (0.01 to 0.015)"
    told = how_measured(json.loads(json.dumps(result()["settings"])))
    for words in ("each-image", "lite0", "128 px (bicubic)", "a" * 12, "b" * 12, "64 px"):
        assert words in told


def test_the_spread_of_a_caption_beside_that_of_its_class():
    """Half as far counts; too few real images or no label are no class; the mean is over images."""

    def line(real, own, images, name="shirt"):
        return {"class": name, "images": images, REAL_APART: real, NOISE_APART: own}

    told = spread([line(20.0, 10.0, 3), line(20.0, 9.0, 1), line(None, 5.0, 4), line(9, 9, 9, "")])
    assert told is not None
    assert "in 1 of 2 classes; mean over the images: 9.75 and 20." in told
    assert spread([{"class": "shirt", "images": 3, REAL_APART: 20.0}]) is None

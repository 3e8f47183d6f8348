"""The search for readers: rows of its trials, and the choice in words."""

from __future__ import annotations

import copy

import pytest

from pipelines.search_tables import search_rows, told
from sdn.choosing import rank_correlation


def point(images, value):
    return {
        "images_seen": images, "value": value, "low": value - 0.01, "high": value + 0.01,
        "seconds": 1.0,
    }  # fmt: skip


RESULT = {
    "score": "KID",
    "chosen": 1,
    "reason": "beats the recipe's own at full length: +0.02 (+0.01 to +0.03)",
    "rank_correlation": {"trials": 4, "value": -0.5, "p_value": 0.1234},
    "trials": [
        {
            "number": 0, "state": "finished", "values": {"conv1": 1.0, "image": 10.0},
            "points": [point(100, 0.5), point(8000, 0.0512345)], "reason": None,
            "full": {"value": 0.04, "low": 0.03, "high": 0.05, "seconds": 60.0, "stages": ["a"]},
        },
        {
            "number": 1, "state": "finished", "values": {"conv1": 0.12345, "image": 99.94},
            "points": [point(8000, 0.03)], "reason": None, "p_value": 0.00123,
            "full": {"value": 0.02, "low": 0.01, "high": 0.03, "p_value": 0.0456},
        },
        {
            "number": 2, "state": "stopped", "values": {"conv1": 5.0, "image": 1.0},
            "points": [point(900, 0.6)], "reason": "behind the others at 900 images seen",
        },
        {
            "number": 3, "state": "failed", "values": {"conv1": 9.0, "image": 1.0}, "points": [],
            "reason": "LossNotFiniteError: step 3 | stage_two",
        },
    ],
}  # fmt: skip


def test_a_row_for_each_trial():
    """A row says who, how far, how good with its interval, at full length too, and with what."""
    rows = search_rows(RESULT)
    assert rows[0] == {
        "trial": "0 (own)",
        "state": "finished",
        "images": "8,000",
        "KID": "0.05123 (0.04123 to 0.06123)",
        "p": "",
        "KID at full length": "0.04 (0.03 to 0.05)",
        "p at full length": "",
        "conv1": "1",
        "image": "10",
        "why": "",
    }
    assert rows[1] == {
        "trial": "1 *",
        "state": "finished",
        "images": "8,000",
        "KID": "0.03 (0.02 to 0.04)",
        "p": "0.0012",
        "KID at full length": "0.02 (0.01 to 0.03)",
        "p at full length": "0.046",
        "conv1": "0.123",
        "image": "99.9",
        "why": "",
    }


def test_trials_without_a_score_have_a_row_too():
    """One that was stopped or failed is shown with its reason, and with empty cells."""
    stopped, failed = search_rows(RESULT)[2:]
    assert (stopped["images"], stopped["state"]) == ("900", "stopped")
    assert stopped["why"] == "behind the others at 900 images seen"
    assert (failed["images"], failed["KID"], failed["p"], failed["KID at full length"]) == (
        "0", "", "", "",
    )  # fmt: skip
    assert failed["why"] == RESULT["trials"][3]["reason"]
    assert failed["conv1"] == "9"


def test_all_rows_have_the_same_columns():
    """As a table of MLflow needs it, whatever became of a trial; all cells are text."""
    rows = search_rows(RESULT)
    assert len({tuple(row) for row in rows}) == 1
    assert all(isinstance(cell, str) for row in rows for cell in row.values())


def test_the_score_names_its_columns():
    """Trials ranked on another score have it in the heading."""
    row = search_rows(RESULT | {"score": "reciprocal rank"})[0]
    assert "reciprocal rank" in row
    assert "reciprocal rank at full length" in row
    assert "KID" not in row


def test_the_choice_is_marked():
    """Exactly one row has the mark: of the values that were taken, the recipe's own too."""
    for chosen in range(4):
        rows = search_rows(RESULT | {"chosen": chosen})
        marked = [number for number, row in enumerate(rows) if row["trial"].endswith(" *")]
        assert marked == [chosen]
    assert search_rows(RESULT | {"chosen": 0})[0]["trial"] == "0 (own) *"


@pytest.mark.parametrize(
    ("chosen", "who"),
    [(0, "the recipe's own values stay: "), (3, "the values of trial 3 are taken: ")],
)
def test_the_choice_in_words(chosen, who):
    """Whose values, why, and how short trials and full length go together."""
    text = told(RESULT | {"chosen": chosen})
    assert text.startswith(who + RESULT["reason"])
    assert "over 4 trials: -0.50 (p = 0.12)" in text


@pytest.mark.parametrize(
    ("short", "full", "words"),
    [
        ({0: 0.1, 1: 0.2}, {0: 0.1, 1: 0.2}, "needs 3 trials at full length, there are 2"),
        ({}, {}, "there are 0"),
        ({0: 0.1, 1: 0.1, 2: 0.1}, {0: 0.1, 1: 0.2, 2: 0.3}, "the scores do not differ"),
        ({0: 0.1, 1: 0.2, 2: 0.3}, {0: 1.0, 1: 2.0, 2: 3.0}, "over 3 trials: +1.00"),
    ],
)
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_a_correlation_that_cannot_be_told(short, full, words):
    """Where there are too few at full length, or all alike, that is said instead."""
    text = told(RESULT | {"rank_correlation": rank_correlation(short, full)})
    assert words in text


def test_a_table_changes_nothing():
    """The result stays as it is."""
    before = copy.deepcopy(RESULT)
    search_rows(RESULT)
    told(RESULT)
    assert before == RESULT

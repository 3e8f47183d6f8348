"""What a run says while it goes on."""

import time

import pytest

from pipelines.console import Display, earlier_and_better
from pipelines.run import STARTING


def test_a_log_has_a_stages_first_and_last_word_and_one_a_minute(capsys, monkeypatch):
    """Without a terminal there is no bar to watch; a line says when, what, how far and how fast."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Display(to_stderr=True).progress() as show:
        for second, stage, share, text in (
            (0, "prepare", 0.0, ""),
            (1, "prepare", 1.0, "300 images"),  # too soon after the first line; the last word of it
            (5, "stage_two", 0.1, "[20 images/s]"),
            (64, "stage_two", 0.5, "21 images/s"),
            (66, "stage_two", 0.6, "22 images/s"),
            (70, "stage_two", 1.0, ""),
        ):
            now[0] = 100.0 + second
            show(stage, share, text)
    found = capsys.readouterr()
    assert found.out == ""
    assert [line.split() for line in found.err.splitlines()] == [
        ["0", "s", "prepare", "0%"],
        ["1", "s", "prepare", "100%", "300", "images"],
        ["5", "s", "stage", "two", "10%", "[20", "images/s]"],
        ["66", "s", "stage", "two", "60%", "22", "images/s"],
        ["70", "s", "stage", "two", "100%", "22", "images/s"],
    ]


def test_an_earlier_stage_whose_images_are_better_is_named():
    """Where the intervals lie apart; a KID that was withheld says nothing."""

    def kid(low, high):
        return {"KID": {"value": (low + high) / 2, "low": low, "high": high}}

    worse = {"stage one": kid(1.0, 2.0), "stage two": kid(2.5, 3.5), "stage three": kid(3.0, 4.0)}
    assert earlier_and_better(worse) == ["stage one"]
    assert earlier_and_better(dict(reversed(worse.items()))) == []
    assert earlier_and_better({**worse, "stage three": {"KID": {"withheld": "too few"}}}) == []
    assert earlier_and_better({"stage two": kid(1.0, 2.0)}) == []


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stage_that_had_nothing_to_say_ends_as_done(terminal, capsys, monkeypatch):
    """At its end a stage is not "starting", in a log as beside a bar."""
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    with Display(to_stderr=True).progress() as show:
        show("compare", 0.0, STARTING)
        show("compare", 1.0, "")
    lines = capsys.readouterr().err.splitlines()
    last = [line for line in lines if "100%" in line][-1]
    assert "done" in last
    assert "starting" not in last
    if not terminal:
        assert lines[0].endswith("starting")
        assert lines[-1].endswith("100%  done")


def test_a_bar_shows_what_a_stage_says_as_it_stands(capsys, monkeypatch):
    """Brackets are no markup; a stage keeps its last word until the next."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display(to_stderr=True).progress() as show:
        show("stage_two", 0.5, "[captions] 20 images/s")
        show("stage_two", 1.0, "")
    last = [line for line in capsys.readouterr().err.splitlines() if "100%" in line][-1]
    assert "[captions] 20 images/s" in last


def test_a_folder_with_brackets_is_shown_whole(capsys):
    """They are no markup: where a result lies is what a person copies."""
    folder = "/data/[old]/prepare/0123"
    done = {"seconds": 1.0, "fresh": True, "note": "", "folder": folder}
    Display(to_stderr=True).stages({"prepare": done}, 2.0)
    assert folder in capsys.readouterr().err

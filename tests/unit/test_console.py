"""What a run says while it goes on."""

import time

from pipelines.console import Display


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

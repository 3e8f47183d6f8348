"""A command that a signal has ended does not wait for ever to tell Prefect."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading
from prefect.exceptions import TerminationSignal
from pipelines.flows import last_words, opening
from pipelines.flows.notices import guarding
from pipelines.flows.stages import terminal
from pipelines.settings import Settings

where, raised, waits, patience, seconds = sys.argv[1:]
last_words._PATIENCE_S = float(patience)
if where == "command":
    terminal.set(print)
RAISED = {
    "Ctrl-C": KeyboardInterrupt(), "SIGTERM": TerminationSignal(15), "an error": ValueError()
}

def prefect_waits():
    threading.Event().wait(float(seconds))

def ray_waits():
    threading.Event().wait(float(seconds))

@guarding
def work() -> None:
    if waits == "ray":
        opening.stop_ray = ray_waits
        with opening.own_ray(Settings()):
            raise RAISED[raised]
    raise RAISED[raised]

try:
    work()
except BaseException:
    if waits == "prefect":
        prefect_waits()
    if waits == "notice":
        with last_words.not_counted():
            prefect_waits()
    if waits == "notice, then prefect":
        with last_words.not_counted():
            pass
        prefect_waits()
    print("came to its end")
"""
SOON, LATER = "0.5", "60"
"""How long its end may take, in seconds: the second is more than an interpreter needs to end."""


def end(*args, options=""):
    """Run it: where it is, what is raised, what waits, how long it may, how long it does."""
    script = f'exec "$0" -c "$@" {options}'
    command = ["bash", "-c", script, sys.executable, PROGRAM, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("raised", "waits", "stands_in"),
    [
        ("Ctrl-C", "prefect", "prefect_waits"),
        ("SIGTERM", "prefect", "prefect_waits"),
        ("Ctrl-C", "ray", "ray_waits"),
        ("Ctrl-C", "notice, then prefect", "prefect_waits"),
    ],
)
def test_an_interrupted_command_that_does_not_end_shows_where_it_waits(raised, waits, stands_in):
    done = end("command", raised, waits, SOON, "600")
    assert done.returncode == 1
    assert f"in {stands_in}" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("where", "raised", "waits", "may", "does"),
    [
        ("command", "Ctrl-C", "prefect", LATER, "0"),  # its end is in time
        ("command", "an error", "prefect", SOON, "2"),  # Prefect is told as long as it takes
        ("worker", "Ctrl-C", "prefect", SOON, "2"),  # Prefect sees to its processes itself
    ],
)
def test_any_other_end_is_left_alone(where, raised, waits, may, does):
    done = end(where, raised, waits, may, does)
    assert done.returncode == 0, done.stderr
    assert "came to its end" in done.stdout


@pytest.mark.rest
def test_a_notice_may_take_its_time():
    done = end("command", "Ctrl-C", "notice", "10", "12")
    assert done.returncode == 0, done.stderr
    assert "came to its end" in done.stdout


def test_standard_error_may_be_closed():
    done = end("command", "Ctrl-C", "prefect", SOON, "600", options="2>&-")
    assert done.returncode == 1
    assert not done.stdout

"""A command that a signal has ended does not wait for ever to tell Prefect."""

from __future__ import annotations

import subprocess
import sys

import pytest

WAITING = """
import sys, threading
from pipelines.flows import last_words
from pipelines.flows.notices import guarding
from pipelines.flows.stages import terminal

def prefect_waits():
    threading.Event().wait(float(sys.argv[3]))

last_words._PATIENCE_S = 0.5
if sys.argv[1] == "command":
    terminal.set(print)

@guarding
def work() -> None:
    raise {"KeyboardInterrupt": KeyboardInterrupt, "ValueError": ValueError}[sys.argv[2]]

try:
    work()
except BaseException:
    prefect_waits()
    print("came to its end")
"""


def wait(*args):
    """Run it: where, what is raised, and how long its end takes in seconds."""
    command = [sys.executable, "-c", WAITING, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_after_that_time_it_shows_where_it_waits_and_ends():
    done = wait("command", "KeyboardInterrupt", "600")
    assert done.returncode == 1
    assert "in prefect_waits" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("where", "raised", "seconds"),
    [
        ("command", "KeyboardInterrupt", "0"),  # its end is in time
        ("command", "ValueError", "2"),  # Prefect is told of a failure as long as it takes
        ("worker", "KeyboardInterrupt", "2"),  # Prefect sees to its processes itself
    ],
)
def test_any_other_end_is_left_alone(where, raised, seconds):
    done = wait(where, raised, seconds)
    assert done.returncode == 0, done.stderr
    assert "came to its end" in done.stdout


@pytest.mark.parametrize(("seconds", "status"), [("600", 1), ("0", 0)])
def test_standard_error_may_be_closed(seconds, status):
    script = f'exec "$0" -c "$1" command KeyboardInterrupt {seconds} 2>&-'
    command = ["bash", "-c", script, sys.executable, WAITING]
    assert subprocess.run(command, timeout=60, check=False).returncode == status

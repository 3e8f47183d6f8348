"""Whether a process that was written down still lives."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from pipelines import processes
from pipelines.processes import Life, life, this_process


def test_this_process_lives():
    """It finds itself, and its name does not change."""
    assert this_process() == this_process()
    assert life(this_process()) is Life.ALIVE


def test_a_process_that_has_ended_is_gone():
    """Running it lives; killed it is gone, collected by its parent or not."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = processes._started(child.pid)
    name = dataclasses.replace(this_process(), pid=child.pid, started=started)
    assert life(name) is Life.ALIVE
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not collected
    assert life(name) is Life.GONE
    child.wait()
    assert life(name) is Life.GONE


def test_a_process_id_that_is_used_again_is_another_process():
    """The moment of its start tells them apart."""
    assert life(dataclasses.replace(this_process(), started="1")) is Life.GONE


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"machine": "another"}, Life.ELSEWHERE),
        ({"space": "a container"}, Life.ELSEWHERE),
        ({"boot": "an earlier one"}, Life.REBOOTED),
        ({"machine": "another", "boot": "another"}, Life.ELSEWHERE),
    ],
)
def test_where_this_process_cannot_look(change, expected):
    """Of another machine or container nothing is claimed, of an earlier boot only that."""
    assert life(dataclasses.replace(this_process(), **change)) is expected


def test_a_process_that_is_hidden_is_not_gone(monkeypatch):
    """Where the system hides other accounts' processes, one that exists cannot be judged."""

    def refused(pid, number):
        raise PermissionError

    monkeypatch.setattr(processes.os, "kill", refused)
    assert life(dataclasses.replace(this_process(), pid=2**22 + 1)) is Life.ELSEWHERE

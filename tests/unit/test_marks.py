"""Processes of a stack are found by what their environment says."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from pipelines.ending import end, runs
from pipelines.marks import mark, mark_of, marked

CHAIN = """
import os, subprocess, sys, time
code, *below = sys.argv[1:]
print(os.getpid(), flush=True)
if below:
    env = {"bare": {}, "flow run": os.environ | {"PREFECT__FLOW_RUN_ID": "f1"}}.get(below[0])
    again = [sys.executable, "-c", code, code, *below[1:]]
    subprocess.Popen(again, start_new_session=True, env=env)
time.sleep(100)
"""
"""Processes each of which starts the next; one that is bare has overwritten its environment."""


@pytest.fixture
def start(tmp_path):
    """Starts a marked process over others, each of its own session; all ended at last."""
    started = []

    def begin(part="s3", below=("child",), **env):
        top = subprocess.Popen(
            [sys.executable, "-c", CHAIN, CHAIN, *below],
            env=os.environ | mark(tmp_path, part) | env, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(top)
        found = [psutil.Process(int(top.stdout.readline())) for _ in (part, *below)]
        started.extend(found[1:])
        return found

    yield begin
    for one in started:
        if isinstance(one, subprocess.Popen):
            one.kill()
            one.wait()
        else:
            end([one], 0)


def test_a_child_is_found_after_its_parent_was_killed(start, tmp_path):
    """The mark is inherited, whoever is the parent now."""
    parent, child = start()
    assert {one.process.pid for one in marked(tmp_path)} == {parent.pid, child.pid}
    end([parent], 0)
    (left,) = marked(tmp_path)
    assert (left.process.pid, left.part, left.flow_run) == (child.pid, "s3", None)


def test_a_child_without_the_mark_is_found_by_its_parent(start, tmp_path):
    """A process that has overwritten its environment is still a part."""
    _, child = start("ray", ["bare"])
    assert mark_of(child) is None
    found = {one.process.pid: one.part for one in marked(tmp_path)}
    assert found[child.pid] == "ray"


def test_a_rank_is_its_flow_runs_and_not_the_workers(start, tmp_path):
    """Worker, flow run, a rank that has overwritten its environment: the nearest mark counts."""
    worker, run, rank = start("worker", ["flow run", "bare"])
    assert mark_of(rank) is None
    found = {one.process.pid: (one.part, one.flow_run) for one in marked(tmp_path)}
    assert found == {
        worker.pid: ("worker", None),
        run.pid: ("worker", "f1"),
        rank.pid: ("worker", "f1"),
    }


def test_other_stacks_are_not_found(start, tmp_path):
    """Folders are told apart."""
    start()
    assert marked(tmp_path / "other") == []


def test_who_looks_does_not_find_itself(tmp_path):
    """Nor those that started it: a command of a stack's own does not end itself."""
    looks = "import sys; from pathlib import Path; from pipelines.marks import marked; "
    looks += "print(marked(Path(sys.argv[1])))"
    outer = "import subprocess as s, sys; s.run([sys.executable, '-c', *sys.argv[1:]], check=True)"
    done = subprocess.run(
        [sys.executable, "-c", outer, looks, str(tmp_path)],
        env=os.environ | mark(tmp_path, "s3"), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[]\n"


def test_flow_runs_are_told_from_their_worker(start, tmp_path):
    """Prefect's own variable says which run a process does."""
    start("worker", PREFECT__FLOW_RUN_ID="f1")
    assert {one.flow_run for one in marked(tmp_path)} == {"f1"}


def test_what_does_not_end_is_killed(tmp_path):
    """SIGTERM first; SIGKILL to what ignores it, and that is told."""
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); "
    commands = {"deaf": deaf, "hears": "import time; print(1, flush=True); "}
    found = {}
    for name, text in commands.items():
        process = subprocess.Popen(
            [sys.executable, "-c", f"{text}time.sleep(100)"], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        found[name] = process
    killed = end([psutil.Process(one.pid) for one in found.values()], 0.5)
    assert [one.pid for one in killed] == [found["deaf"].pid]
    assert {name: one.wait() for name, one in found.items()} == {"deaf": -9, "hears": -15}


def test_a_dead_child_that_nobody_collected_does_not_run():
    """A zombie counts as ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    seen = psutil.Process(process.pid)
    until = time.monotonic() + 20
    while runs(seen):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert process.wait() == 0

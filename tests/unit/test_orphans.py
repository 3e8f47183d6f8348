import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

PARENT = """
import subprocess, sys, time
from pipelines.orphans import ended_with_this_process

child = (
    "import subprocess, sys, time;"
    "p = subprocess.Popen(['sleep', '300'], start_new_session=True);"
    "print(p.pid, flush=True); time.sleep(300)"
)
with ended_with_this_process():
    middle = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    grandchild = middle.stdout.readline().strip()
    time.sleep(2.5)  # the companion looks once a second
    print(middle.pid, grandchild, flush=True)
    if sys.argv[1] == "killed":
        time.sleep(300)
    if sys.argv[1] == "raises":
        raise RuntimeError("broken")
print("after", flush=True)
"""


def start(how):
    """The parent, and the processes below it once they are known to the companion."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2, parent.stderr.read()
    return parent, pids


def left_after(pids, seconds):
    """Those of the processes that still run after at most this time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        alive = [pid for pid in pids if running(pid)]
        if not alive:
            return []
        time.sleep(0.1)
    return alive


def running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(parent, pids):
    """Leave nothing behind where a test fails."""
    for pid in [parent.pid, *pids]:
        if running(pid):
            os.kill(pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    parent.stderr.close()


@pytest.mark.timeout(90)
def test_killed_run_leaves_no_process():
    """A run that dies by SIGKILL takes its child and grandchild with it within 15 s."""
    parent, pids = start("killed")
    try:
        assert all(running(pid) for pid in pids)
        parent.kill()
        assert parent.wait() == -signal.SIGKILL
        assert left_after(pids, 15) == []
    finally:
        end(parent, pids)


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("how", "code"), [("normally", 0), ("raises", 1)])
def test_ended_run_leaves_no_process(how, code):
    """A run that comes to its end, or raises, leaves none either, and goes on itself."""
    parent, pids = start(how)
    try:
        out, err = parent.communicate(timeout=30)
        assert parent.returncode == code
        assert ("after" in out) == (how == "normally")
        assert ("RuntimeError: broken" in err) == (how == "raises")
        assert left_after(pids, 15) == []
    finally:
        end(parent, pids)


@pytest.mark.timeout(60)
def test_other_processes_are_left_alone():
    """Only what the run started is ended."""
    other = subprocess.Popen(["sleep", "60"])
    try:
        parent, pids = start("normally")
        parent.communicate(timeout=30)
        assert left_after(pids, 15) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()

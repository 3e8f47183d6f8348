"""An attempt that is asked to stop, whether or not its ranks have begun."""

from __future__ import annotations

import _thread
import signal
import threading
from types import SimpleNamespace

import pytest

from pipelines import supervising
from pipelines.supervising import _fit, _Watch

pytestmark = pytest.mark.timeout(60)
PATIENT = SimpleNamespace(grace_s=600.0)
"""An order whose last checkpoint is waited for longer than a test may take."""


@pytest.fixture
def sent(monkeypatch):
    """Signals sent to ranks: (pid, signal)."""
    found: list[tuple[int, signal.Signals]] = []

    def end_ranks(ranks, number):
        found.extend((one["pid"], number) for one in ranks)

    monkeypatch.setattr(supervising, "end_ranks", end_ranks)
    return found


def rank(pid):
    return {"rank": 0, "world": 1, "pid": pid, "node": "n"}


def test_no_rank_that_has_not_begun_is_waited_for(sent, caplog):
    """Ranks may still be loading, or wait for room on a cluster: there is nothing to write down."""
    over = threading.Event()

    def never_begins():
        _thread.interrupt_main()
        over.wait()

    try:
        with pytest.raises(KeyboardInterrupt):
            _fit(never_begins, _Watch(60), PATIENT)
    finally:
        over.set()
    assert sent == []
    assert "stopped before the ranks began" in caplog.text


def test_a_rank_that_begins_late_is_asked_too(sent, caplog):
    """Ranks are lost as they are asked, and others take their place: those would train on."""
    watch = _Watch(60)

    def begins_again():
        watch.heard("worker", rank(pid=1))
        _thread.interrupt_main()
        until = threading.Event()
        while (1, signal.SIGTERM) not in sent:
            until.wait(0.01)
        watch.heard("worker", rank(pid=2))

    with pytest.raises(KeyboardInterrupt):
        _fit(begins_again, watch, PATIENT)
    assert sent == [(1, signal.SIGTERM), (2, signal.SIGTERM)]
    assert "stopped; the same command goes on" in caplog.text

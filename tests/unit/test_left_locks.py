"""No lock of logging or of imports stays taken by an interrupt; others would wait for ever."""

from __future__ import annotations

import _imp
import io
import logging
import signal
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from prefect.exceptions import TerminationSignal

from pipelines import supervising
from pipelines.dropped_signals import heard_again
from pipelines.flows import opening
from pipelines.flows.early_server import early_server
from pipelines.flows.stages import do
from pipelines.left_locks import locks_given_back
from pipelines.run import Job, RunSpec
from pipelines.settings import Settings
from pipelines.stage import Stage
from sdn.data.files import LocalFolder

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def locks():
    """How each is taken and given back: logging's own, a handler's, that of imports."""
    handler = logging.StreamHandler(io.StringIO())
    found = [
        (logging._lock.acquire, logging._lock.release),
        (handler.acquire, handler.release),
        (_imp.acquire_lock, _imp.release_lock),
    ]
    yield found
    for _, release in found:  # where a test has failed
        with suppress(RuntimeError):
            while True:
                release()


def interrupted_with(locks, raised):
    """An interrupt comes just after they were taken, one within the other."""
    for take, _ in locks:
        take()
        take()
    raise raised


def another_gets(take, release):
    """Whether another thread gets the lock."""

    def work():
        take()
        release()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=5)
    return not thread.is_alive()


@pytest.mark.parametrize("within", [locks_given_back, heard_again])
@pytest.mark.parametrize("raised", [KeyboardInterrupt(), TerminationSignal(signal.SIGTERM)])
def test_another_thread_gets_them(locks, within, raised):
    with pytest.raises(type(raised)):
        within()(interrupted_with)(locks, raised)
    assert [another_gets(*lock) for lock in locks] == [True, True, True]


def test_without_it_another_thread_waits(locks):
    """What this is for; else the tests above could not fail."""
    with pytest.raises(KeyboardInterrupt):
        interrupted_with(locks, KeyboardInterrupt())
    assert not another_gets(*locks[0])


def test_handlers_without_a_lock_are_passed_over(locks):
    """One that is being made is listed already; one that writes nothing has none."""
    half_made, nothing = logging.Handler.__new__(logging.Handler), logging.NullHandler()
    logging._addHandlerRef(half_made)
    assert not hasattr(half_made, "lock")
    assert nothing.lock is None
    with pytest.raises(KeyboardInterrupt), locks_given_back():
        interrupted_with(locks, KeyboardInterrupt())
    assert another_gets(*locks[0])


def test_what_another_thread_has_taken_is_left_to_it():
    taken, over = threading.Event(), threading.Event()
    odd = logging.StreamHandler(io.StringIO())
    odd.lock = threading.Lock()  # of a kind that any thread can give back

    def work():
        with logging._lock, odd.lock:
            taken.set()
            over.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert taken.wait(30)
        with pytest.raises(KeyboardInterrupt), locks_given_back():
            raise KeyboardInterrupt
        assert not logging._lock.acquire(blocking=False)
        assert odd.lock.locked()
    finally:
        over.set()
        thread.join()


def test_a_command_does_not_wait_for_the_start_of_its_server(locks, monkeypatch):
    """An interrupt as it imports the flows, while a thread starts Prefect's server and logs."""
    from prefect.server.api import server

    began = threading.Event()

    class Slow:
        def start(self):
            began.set()
            time.sleep(0.5)
            with logging._lock:
                pass

    monkeypatch.setattr(server, "subprocess", server.subprocess)  # what `early_server` changes
    monkeypatch.setattr(server, "SubprocessASGIServer", Slow)

    def command():
        with early_server():
            assert began.wait(30)
            interrupted_with(locks, KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt):
        command()


def test_ray_ends_when_they_are_free(locks, monkeypatch):
    found = []
    monkeypatch.setattr(opening, "stop_ray", lambda: found.append(another_gets(*locks[0])))
    with pytest.raises(KeyboardInterrupt), opening.own_ray(Settings()):
        interrupted_with(locks, KeyboardInterrupt())
    assert found == [True]


def test_a_training_leaves_none(locks, monkeypatch, tmp_path):
    """As it begins, imports and lines of log are many."""
    order = SimpleNamespace(place=lambda: LocalFolder(tmp_path))
    monkeypatch.setattr(supervising, "write_order", lambda _: b"{}")
    monkeypatch.setattr(supervising, "_newest", lambda _: None)
    monkeypatch.setattr(
        supervising, "_attempt", lambda *_: interrupted_with(locks, KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        supervising.train_stage(order, listen=lambda *_: None)
    assert another_gets(*locks[0])


def test_ranks_are_waited_for_when_they_are_free(locks, monkeypatch):
    found = []
    monkeypatch.setattr(supervising, "_over", lambda *_: interrupted_with(locks, SystemExit()))
    monkeypatch.setattr(supervising, "_stop", lambda *_: found.append(another_gets(*locks[0])))
    with pytest.raises(SystemExit):
        supervising._fit(lambda: None, supervising._Watch(60), SimpleNamespace(grace_s=0.0))
    assert found == [True]


@pytest.mark.timeout(180)
def test_a_task_leaves_none(locks, tmp_path):
    """MLflow's run and Ray end before its flow does."""
    from prefect import flow
    from prefect.testing.utilities import prefect_test_harness

    found = []

    @flow
    def interrupted():
        run = RunSpec("tiny", store=str(tmp_path)).open()

        def work(_folder):
            interrupted_with(locks, KeyboardInterrupt())

        try:
            do(run, Job(stage=Stage(name="some", config={}), work=work))
        except KeyboardInterrupt:
            found.append(another_gets(*locks[0]))

    with prefect_test_harness(server_startup_timeout=90):
        interrupted()
    assert found == [True]

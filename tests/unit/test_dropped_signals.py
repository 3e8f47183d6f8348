"""A Ctrl-C or SIGTERM whose exception Python drops ends a command all the same."""

from __future__ import annotations

import _imp
import io
import logging
import signal
import sys
import threading
import time
import weakref

import pytest
from prefect.exceptions import TerminationSignal

from pipelines.dropped_signals import heard_again
from pipelines.flows.notices import guarding
from pipelines.stack_signals import ends_by_interrupt
from pipelines.terminal import expected_errors

pytestmark = pytest.mark.timeout(60)


class Thing:
    """Something that a weak reference can be made of."""


def dropped(number, then=lambda: None):
    """A signal arrives in the callback of a weak reference, as in that at the end of an import."""
    thing = Thing()
    gone = weakref.ref(thing, lambda _: signal.raise_signal(number))
    del thing
    assert gone() is None
    then()
    time.sleep(30)


@pytest.mark.parametrize("within", [heard_again, expected_errors, ends_by_interrupt])
def test_a_dropped_ctrl_c_is_raised_again(within):
    with pytest.raises(KeyboardInterrupt), within():
        dropped(signal.SIGINT)


def test_a_dropped_ctrl_c_ends_a_flow():
    with pytest.raises(KeyboardInterrupt):
        guarding(dropped)(signal.SIGINT)


@pytest.mark.parametrize("raised", [SystemExit, TerminationSignal])
def test_a_dropped_sigterm_is_raised_again(raised):
    """Ray's handler raises the one, Prefect's the other."""

    def handler(number, frame):
        raise raised(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(raised), heard_again():
            dropped(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stack_under_a_script_hears_a_dropped_sigterm():
    """Where a shell started it with `&`, SIGINT is ignored and cannot stand for it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), ends_by_interrupt():
            dropped(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stack_hears_the_second_where_the_first_was_dropped_for_good():
    """Its handler hears one signal alone; it is armed again before that comes again."""
    with pytest.raises(KeyboardInterrupt), ends_by_interrupt():
        dropped(signal.SIGTERM, then=lambda: signal.raise_signal(signal.SIGHUP))
    time.sleep(0.2)  # the first does not come again once the second was heard


def taken_elsewhere(take, release):
    """Whether another thread gets the lock."""

    def work():
        take()
        release()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=5)
    return not thread.is_alive()


@pytest.mark.parametrize("raised", [KeyboardInterrupt, TerminationSignal])
def test_no_lock_of_logging_or_imports_stays_taken(raised):
    """The exception may come just after one was taken; all other threads would wait for ever."""
    without_lock, handler = logging.NullHandler(), logging.StreamHandler(io.StringIO())
    assert without_lock.lock is None
    locks = [
        (logging._lock.acquire, logging._lock.release),
        (handler.acquire, handler.release),
        (_imp.acquire_lock, _imp.release_lock),
    ]

    def interrupted():
        for take, _ in locks:
            take()
            take()
        raise raised(signal.SIGTERM)

    with pytest.raises(raised):
        heard_again()(interrupted)()
    assert [taken_elsewhere(*lock) for lock in locks] == [True, True, True]


def test_locks_that_another_thread_has_taken_stay_so():
    taken, over = threading.Event(), threading.Event()

    def work():
        with logging._lock:
            taken.set()
            over.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert taken.wait(30)
        with pytest.raises(KeyboardInterrupt), heard_again():
            raise KeyboardInterrupt
        assert not logging._lock.acquire(blocking=False)
    finally:
        over.set()
        thread.join()


def test_any_other_exception_is_told_as_before(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: heard.append(about.exc_type))
    thing = Thing()
    with heard_again():
        kept = weakref.ref(thing, lambda _: 1 / 0)
        del thing
    assert kept() is None
    assert heard == [ZeroDivisionError]

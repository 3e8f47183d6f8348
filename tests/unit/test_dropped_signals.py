"""A Ctrl-C or SIGTERM whose exception Python drops ends a command all the same."""

from __future__ import annotations

import signal
import sys
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


def test_any_other_exception_is_told_as_before(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: heard.append(about.exc_type))
    thing = Thing()
    with heard_again():
        kept = weakref.ref(thing, lambda _: 1 / 0)
        del thing
    assert kept() is None
    assert heard == [ZeroDivisionError]

"""What ends a command that holds a stack: Ctrl-C, SIGTERM, a closed terminal; one is enough."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines.dropped_signals import heard_again

if TYPE_CHECKING:
    from collections.abc import Iterator

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def ends_by_interrupt() -> Iterator[None]:
    """The first of them raises KeyboardInterrupt inside; what follows it changes nothing.

    One that is ignored already stays so: `nohup` asks for that.
    """
    came = signal.SIGINT
    heard = [one for one in _ENDING if signal.getsignal(one) is not signal.SIG_IGN]

    def first(number: int, _: object) -> None:
        nonlocal came
        came = signal.Signals(number)
        for one in _ENDING:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    def arm() -> signal.Signals:
        for one in heard:
            signal.signal(one, first)
        return came

    with _kept(), heard_again(arm):
        arm()
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """None of them changes anything inside: half a stack would be left."""
    with _kept():
        for one in _ENDING:
            signal.signal(one, signal.SIG_IGN)
        yield


@contextmanager
def _kept() -> Iterator[None]:
    before = {one: signal.getsignal(one) for one in _ENDING}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)

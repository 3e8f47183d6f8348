"""A Ctrl-C or SIGTERM ends what it is to end, wherever in Python its exception is raised.

The exception is lost where it is raised in a callback of a weak reference or of the garbage
collector, or in a `__del__`: "Exception ignored in", and the program goes on. Each import ends with
such a callback, and a command that starts imports for seconds.

And where it is raised just after a lock was taken, before the block that gives it back, the lock
stays taken: `logging` and imports take theirs that way, up to Python 3.12. The thread itself may
take it again, all others wait for ever, and it for them.
"""

from __future__ import annotations

import _imp
import logging
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_AFTER_S = 0.05
"""Until the callback is over: what is raised in the hook itself would be dropped as well."""


@contextmanager
def heard_again(came: Callable[[], signal.Signals] | None = None) -> Iterator[None]:
    """Send a signal again whose exception was dropped in the main thread, where all are raised.

    What leaves it leaves no lock of `logging` or of imports taken.

    Args:
        came: the signal to send, where that cannot be told from the exception; called in the main
            thread, so that it may set handlers.
    """
    before = sys.unraisablehook
    waiting: list[threading.Timer] = []

    def dropped(about: sys.UnraisableHookArgs) -> None:
        number = _signal_of(about.exc_type)
        main = threading.main_thread()
        if number is None or threading.current_thread() is not main or main.ident is None:
            before(about)
            return
        number = number if came is None else came()
        again = threading.Timer(_AFTER_S, signal.pthread_kill, (main.ident, number))
        again.daemon = True
        waiting.append(again)
        again.start()

    sys.unraisablehook = dropped
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            _give_back_locks()
        raise
    finally:
        sys.unraisablehook = before
        for one in waiting:  # another signal was heard meanwhile, or all is done
            one.cancel()


def _give_back_locks() -> None:
    """Those that an interrupt has left taken by this thread, which neither logs nor imports now."""
    handlers = [found() for found in logging._handlerList]  # type: ignore[attr-defined]  # noqa: SLF001
    locks = [logging._lock, *(one.lock for one in handlers if one is not None)]  # type: ignore[attr-defined]  # noqa: SLF001
    for release in (*(lock.release for lock in locks if lock is not None), _imp.release_lock):
        with suppress(RuntimeError):  # this thread has not taken it, or not once more
            while True:
                release()


def _signal_of(kind: type[BaseException]) -> signal.Signals | None:
    """The signal that raises this exception; None for any other."""
    if issubclass(kind, KeyboardInterrupt):
        return signal.SIGINT
    # Ray's handler of SIGTERM raises the first, Prefect's the second; by name, for most commands
    # do without Prefect.
    names = {one.__name__ for one in kind.__mro__}
    return signal.SIGTERM if names & {"SystemExit", "TerminationSignal"} else None

"""A Ctrl-C that Python drops is heard all the same, and so is a SIGTERM.

Their exception is lost where it is raised in a callback of a weak reference or of the garbage
collector, or in a `__del__`: "Exception ignored in", and the program goes on. Each import ends with
such a callback, and a command that starts imports for seconds.
"""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines.left_locks import locks_given_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_AFTER_S = 0.05
"""Until the callback is over: what is raised in the hook itself would be dropped as well."""


@contextmanager
def heard_again(came: Callable[[], signal.Signals] | None = None) -> Iterator[None]:
    """Send a signal again whose exception was dropped in the main thread, where all are raised.

    An interrupt leaves no lock taken, either, see `locks_given_back`.

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
        with locks_given_back():
            yield
    finally:
        sys.unraisablehook = before
        for one in waiting:  # another signal was heard meanwhile, or all is done
            one.cancel()


def _signal_of(kind: type[BaseException]) -> signal.Signals | None:
    """The signal that raises this exception; None for any other."""
    if issubclass(kind, KeyboardInterrupt):
        return signal.SIGINT
    # Ray's handler of SIGTERM raises the first, Prefect's the second; by name, for most commands
    # do without Prefect.
    names = {one.__name__ for one in kind.__mro__}
    return signal.SIGTERM if names & {"SystemExit", "TerminationSignal"} else None

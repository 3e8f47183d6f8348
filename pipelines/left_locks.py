"""Locks that an interrupt has left taken are given back.

The exception of a signal may be raised between a statement that takes a lock and the block that
gives it back. `logging`, up to Python 3.12, and imports take theirs that way. The thread itself may
take such a lock again; all others wait for it for ever, and so does whoever waits for them.
"""

from __future__ import annotations

import _imp
import logging
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def locks_given_back() -> Iterator[None]:
    """An interrupt that leaves this leaves no lock of `logging` or of imports taken.

    To be put within whatever waits for other threads. Not for a thread that has taken one of these
    locks with right when it comes here, from within a handler of logs, say.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException:
        _give_back()
        raise


def _give_back() -> None:
    # Of handlers only locks of the usual kind: one of another kind might be another thread's. A
    # handler that is being made has none yet.
    own = logging._lock  # type: ignore[attr-defined]  # noqa: SLF001
    handlers = [found() for found in logging._handlerList]  # type: ignore[attr-defined]  # noqa: SLF001
    others = [getattr(one, "lock", None) for one in handlers]
    locks = [own, *(one for one in others if type(one) is type(own))]
    for release in (*(one.release for one in locks), _imp.release_lock):
        with suppress(RuntimeError):  # this thread has not taken it, or not once more
            while True:
                release()

"""Which tests run beside each other when pytest-xdist has several processes (`make test`)."""

from __future__ import annotations

import signal
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from xdist.remote import Producer

ALONE = {"chaos", "distributed", "e2e"}
"""Folders of tests that start trainings, which want the cores for themselves."""


def alone(nodeid: str) -> bool:
    """Whether a test wants the cores for itself."""
    return not ALONE.isdisjoint(PurePosixPath(nodeid.partition("::")[0]).parts)


class QuickOnesTogether(LoadScopeScheduling):
    """Files of quick tests go to whichever process is free; one process runs all others."""

    def _split_scope(self, nodeid: str) -> str:
        return "alone" if alone(nodeid) else nodeid.partition("::")[0]


def pytest_configure() -> None:
    """What tests start hears SIGINT, also where a script started pytest with `&`.

    A shell without job control lets such a command ignore it, and all that the command starts.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The quick tests first."""
    items.sort(key=lambda item: alone(item.nodeid))


# xdist's own groups by mark (`--dist loadgroup`) do nothing with pytest 9.2: it has no longer the
# attribute of a test in which they are kept.
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> QuickOnesTogether:
    """Scopes are given out in the order of the tests, not the one with most tests first."""
    config.option.loadscopereorder = False
    return QuickOnesTogether(config, log)

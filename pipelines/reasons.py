"""Why a training failed, out of what Ray wraps around it, and whether it would fail again."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
"""Of an OSError that waiting does not mend."""


class TrainingError(RuntimeError):
    """A stage failed on its workers; the text carries their reason."""

    def __init__(self, text: str, *, final: bool = True) -> None:
        super().__init__(text)
        self.final = final
        """Whether another attempt would come to the same end."""


def reason(error: BaseException) -> str:
    """The first cause of a worker's failure, in one paragraph."""
    first = cause(error)
    if isinstance(first, OSError) and first.errno == errno.ENOSPC:
        return (
            f"the disk is full ({first}): free some space and run the same command again; it goes "
            "on from the newest whole checkpoint"
        )
    return f"{type(first).__name__}: {first}"


def final(error: BaseException) -> bool:
    """Whether the same would happen again: wrong input and config, damage, a full disk."""
    first = cause(error)
    if isinstance(first, OSError):
        return first.errno in _FULL or isinstance(first, FileNotFoundError)
    return isinstance(
        first, (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, ImportError)
    )


def cause(error: BaseException) -> BaseException:
    """The first cause, of the rank whose failure says most.

    Where one rank fails the others fail too, their connection being gone: what is a fault of the
    training itself goes before that.
    """
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    if failures:
        causes = [cause(inner) for inner in failures.values()]
        telling = [found for found in causes if not isinstance(found, RuntimeError)]
        return (telling or causes)[0]
    for name in ("controller_failure", "_base_exc", "cause", "__cause__"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return cause(inner)
    return error

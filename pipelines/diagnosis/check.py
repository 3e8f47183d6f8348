"""One thing that was looked at, and how checks are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at."""

    ok: bool
    what: str
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


Look = Callable[[], Iterable[Check]]


def guarded(what: str, look: Look) -> Iterator[Check]:
    """The checks of a look; one that breaks off is a finding, not an error of the doctor.

    A package that is missing has a line of its own already.
    """
    try:
        yield from look()
    except ModuleNotFoundError:
        return
    except Exception as error:  # noqa: BLE001 (whatever a server or a library throws)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        yield Check(
            ok=False, what=what, found=reason, remedy="it could not be looked at any further"
        )

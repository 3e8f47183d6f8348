"""A training whose gradients leave all proportion while its loss is still a number."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_FACTOR = 100
"""A norm of so many times the usual one is out of proportion; batches differ by far less."""
_FIRST = 10
"""Norms before which none is called usual."""
_LASTING = 3
"""Reports in a row that must be so: of a single bad batch a training recovers."""
_REMEMBERED = 100
"""Reports back to which norms are usual."""


class Divergence:
    """Follows the norms of an attempt's gradients; says once that they have left all proportion."""

    def __init__(self, name: str) -> None:
        """Args:
        name: of the stage, as in the config.
        """
        self._name = name
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)
        self._high = 0
        self._said = False

    def notice(self, step: int, norm: float) -> str | None:
        """What a person should know after a report; None where all is well or it was said before.

        Args:
            step: global steps done.
            norm: of the gradient, before it is clipped. One that is not finite is passed over: a
                step in fp16 may overflow, any other ends the training.
        """
        if self._said or not math.isfinite(norm):
            return None
        usual = median(self._norms) if len(self._norms) >= _FIRST else math.inf
        if norm <= _FACTOR * usual or usual == 0:
            self._norms.append(norm)
            self._high = 0
            return None
        self._high += 1
        if self._high < _LASTING:
            return None
        self._said = True
        change = f"a lower rate (--set {self._name}.rate=...)"
        if self._name.startswith("stage"):
            change += f" or a lower limit to the gradient (--set {self._name}.clip=...)"
        return (
            f"at step {step} the gradient's norm is {norm:.3g}, where {usual:.3g} was usual: the "
            "training seems to have diverged, though its loss is a number. It goes on; where what "
            f"it makes is spoilt, end it and take {change}"
        )

"""torch.compile where it pays; where it does not work, plain execution and the reason."""

from __future__ import annotations

import logging
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


def compiled(
    function: Callable[..., Any], wanted: Literal["auto", "on", "off"], device: torch.device
) -> Callable[..., Any]:
    """The function, compiled if that is wanted and possible.

    auto compiles on GPUs alone: on a CPU the compiled step was slower than the plain one, after
    most of a minute of compiling (figures in DECISIONS.md).

    Args:
        function: of tensors.
        wanted: see `sdn.config.StageConfig.compile`.
        device: where it will run.

    Returns:
        What computes the same. If the first call cannot be compiled, a warning says why, and it and
        all others run as they are.
    """
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return function
    lacking = _lacking(device)
    if lacking is not None:
        logger.warning("not compiled: %s", lacking)
        return function
    return _Falling(function)


def _lacking(device: torch.device) -> str | None:
    """What compiling would need and is not there."""
    if device.type == "cuda":
        return None if find_spec("triton") else "Triton is not installed (pip install triton)"
    found = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return None if found else "no C++ compiler was found (g++ or clang++)"


class _Falling:
    """A compiled function that falls back to the plain one where compiling fails."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._plain = function
        self._function: Callable[..., Any] = torch.compile(function)
        self._worked = False

    def __call__(self, *values: Any, **named: Any) -> Any:
        if self._worked:
            return self._function(*values, **named)
        try:
            found = self._function(*values, **named)
        except Exception as error:  # noqa: BLE001 (whatever a compiler throws)
            first = (str(error) or type(error).__name__).splitlines()[0]
            logger.warning("not compiled: %s", first)
            self._function = self._plain
            found = self._plain(*values, **named)
        self._worked = True
        return found

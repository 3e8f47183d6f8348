"""Points of a training, spooled beside its result: one JSON line a step, ordered by step.

MLflow mirrors this file (`pipelines.tracking`), so its absence loses nothing and its return
repeats nothing.
"""

from __future__ import annotations

import json
import time
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

POINTS = "points.jsonl"


class PointLog:
    """Appends points; a step that was rolled back and done again replaces its earlier points."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / POINTS
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        cut_off = self._path.is_file() and not self._path.read_bytes().endswith(b"\n")
        self._file = self._path.open("a", encoding="utf-8")
        if cut_off:  # the last line of a killed process must not swallow the next one
            self._file.write("\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.close()

    def write(self, report: dict[str, Any]) -> None:
        """Append a `StepReport` as a dict."""
        assert self._file is not None
        self._file.write(json.dumps({"time_ms": int(time.time() * 1000), **report}) + "\n")
        self._file.flush()


def read_points(folder: Path) -> Iterator[dict[str, Any]]:
    """The points of a stage by ascending step, each step once: the last time it was done."""
    path = folder / POINTS
    if not path.is_file():
        return
    latest: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            point = json.loads(line)
        except ValueError:
            continue  # the last line of a killed process
        latest[point["step"]] = point
    yield from (latest[step] for step in sorted(latest))

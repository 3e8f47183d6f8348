"""Points of a training, spooled in its place by the rank that made them, one a reported step.

MLflow mirrors them (`pipelines.tracking`), so its absence loses nothing and its return repeats
nothing. A finished stage has them as plain JSON lines beside its result.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from typing import TYPE_CHECKING, Any

from sdn.journal import journal_files, read_lines
from sdn.recording import POINTS as FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sdn.data.files import Files

logger = logging.getLogger(__name__)
POINTS = "points.jsonl"


def spooled_points(place: Files, after: int = -1) -> list[dict[str, Any]]:
    """The points of a training beyond step `after`, ascending, each step once.

    A step that was rolled back and done again counts with its later values.

    Args:
        place: of the training.
        after: what is known already; files that hold nothing newer are not read again.
    """
    latest: dict[int, dict[str, Any]] = {}
    for name, end in _files(place):
        if end is not None and end <= after + 1:
            continue
        try:
            points = list(read_lines(place, name))
        except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            logger.warning("points in %s/%s cannot be read: %s", place.uri, name, error)
            continue
        latest |= {point["step"]: point for point in points if point["step"] > after}
    return [latest[step] for step in sorted(latest)]


def write_points(place: Files, folder: Path) -> None:
    """Put all points of a training into a folder, as JSON lines."""
    lines = (json.dumps(point) + "\n" for point in spooled_points(place))
    with (folder / POINTS).open("w", encoding="utf-8") as file:
        file.writelines(lines)


def read_points(folder: Path) -> Iterator[dict[str, Any]]:
    """The points of a finished stage by ascending step; none where it has none."""
    path = folder / POINTS
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _files(place: Files) -> Iterator[tuple[str, int | None]]:
    """Each file of points, with the first step of the next one of the same attempt."""
    names = journal_files(place, FOLDER)
    for name, following in zip(names, [*names[1:], ""], strict=False):
        attempt, _, _ = name.rpartition("-")
        same = following.startswith(f"{attempt}-")
        end = int(following.rpartition("-")[2].partition(".")[0]) if same else None
        yield name, end

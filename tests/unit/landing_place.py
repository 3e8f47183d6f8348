"""A landing place in a folder, with a clock of its own, for the tests of what arrives there."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sdn.config import DataConfig
from sdn.data.files import LocalFolder
from sdn.data.landing import Look, Marks, arrived

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdn.data.landing import Arrival

NOW = 2_000_000_000.0
"""Seconds since 1970."""
OLD = 600.0
"""Age in seconds at which nobody writes to a file any more."""
FOLDER = DataConfig(source="folder", resolution=32, shard_samples=5, failure_budget=0.01)


def picture(number: int, kind: str = "PNG") -> bytes:
    """An image file of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


@dataclass
class LandingPlace:
    """Files with ages; what a look finds, with what happens while it waits."""

    path: Path
    taken: Marks = field(default_factory=Marks)
    waits: list[float] = field(default_factory=list)

    def put(self, name: str, data: bytes | str, age: float = OLD) -> None:
        """A file that was changed so many seconds ago."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        os.utime(path, (NOW - age, NOW - age))

    def pair(self, number: int, age: float = OLD, caption: str | None = None) -> None:
        """An image with a caption beside it."""
        self.put(f"picture{number:03d}.png", picture(number), age)
        self.put(f"picture{number:03d}.txt", caption or f"picture number {number}\n", age)

    def look(
        self, config: DataConfig = FOLDER, meanwhile: Callable[[], None] = lambda: None, **how
    ) -> Arrival:
        """Look; `meanwhile` happens where the look waits."""

        def sleep(seconds: float) -> None:
            self.waits.append(seconds)
            meanwhile()

        look = Look(settle_s=5, clock=lambda: NOW, sleep=sleep, **how)
        return arrived(LocalFolder(self.path), config, self.taken, look)

    def take(self, found: Arrival) -> None:
        """What was found has gone into the data set."""
        self.taken = self.taken.with_files(found.infos)


def names(found: Arrival) -> list[str]:
    """Files that may be taken."""
    return [info.name for info in found.files.walk()]


def reasons(found: Arrival) -> dict[str, str]:
    """Waiting file -> why."""
    return {one.name: one.reason for one in found.waiting}

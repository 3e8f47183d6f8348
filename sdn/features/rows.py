"""Feature vectors on disk: written once, read in blocks, so that memory does not grow with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

BLOCK = 1024
"""Rows read at a time."""


class Rows:
    """(N, F) float32 in a file, rows one behind the other; or a part of such a file."""

    def __init__(self, path: Path, dim: int, start: int = 0, stop: int | None = None) -> None:
        """Args:
        path: written by `RowWriter`.
        dim: F.
        start, stop: first row, and the row after the last one; None for all.

        Raises:
            ValueError: the file does not hold rows of this length.
        """
        size = path.stat().st_size
        if size % (4 * dim):
            raise ValueError(
                f"{path} has {size} bytes, not a multiple of a row's {4 * dim}: it is cut off or "
                "of another feature network; delete its stage's folder to make it anew"
            )
        self.path, self.dim, self.start = path, dim, start
        self.stop = size // (4 * dim) if stop is None else stop

    def __len__(self) -> int:
        """N."""
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of these, `stop` left out."""
        return Rows(self.path, self.dim, self.start + start, self.start + min(stop, len(self)))

    def read(self, start: int, stop: int) -> Tensor:
        """(stop - start, F) float32; fewer where there are no more."""
        count = max(0, min(stop, len(self)) - start)
        found = np.fromfile(
            self.path, np.float32, count * self.dim, offset=4 * self.dim * (self.start + start)
        )
        return torch.from_numpy(found.reshape(-1, self.dim))

    def blocks(self, size: int = BLOCK) -> Iterator[Tensor]:
        """All rows in order, up to `size` at a time."""
        return (self.read(start, start + size) for start in range(0, len(self), size))

    def take(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), F) float32: the rows of these numbers."""
        found = [self.read(row, row + 1) for row in rows]
        return torch.cat(found) if found else torch.zeros(0, self.dim)

    def pick(self, numbers: Sequence[int]) -> Rows:
        """The rows of these numbers, in this order."""
        return PickedRows(self, numbers)

    def at_most(self, count: int) -> Rows:
        """These rows, or `count` of them spread evenly where there are more."""
        n = len(self)
        return self if n <= count else self.pick([i * n // count for i in range(count)])


class PickedRows(Rows):
    """Some rows of others."""

    def __init__(self, rows: Rows, numbers: Sequence[int]) -> None:
        """Args:
        rows: to pick from.
        numbers: of the rows to take.
        """
        self.rows, self.numbers = rows, list(numbers)
        self.dim, self.start, self.stop = rows.dim, 0, len(self.numbers)

    def part(self, start: int, stop: int) -> Rows:
        """See `Rows`."""
        return PickedRows(self.rows, self.numbers[start:stop])

    def read(self, start: int, stop: int) -> Tensor:
        """See `Rows`."""
        return self.rows.take(self.numbers[start:stop])


class HeldRows(Rows):
    """The same of a tensor in memory."""

    def __init__(self, tensor: Tensor) -> None:
        """Args:
        tensor: (N, F) float32.
        """
        self.tensor, self.dim, self.start, self.stop = tensor, tensor.shape[1], 0, len(tensor)

    def part(self, start: int, stop: int) -> HeldRows:
        """See `Rows`."""
        return HeldRows(self.tensor[start:stop])

    def read(self, start: int, stop: int) -> Tensor:
        """See `Rows`."""
        return self.tensor[start:stop]


class RowWriter:
    """Writes the file that `Rows` reads."""

    def __init__(self, path: Path) -> None:
        self.path, self.dim = path, 0
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, rows: Tensor) -> None:
        """Append (B, F) rows."""
        self.dim = rows.shape[1]
        self._file.write(np.ascontiguousarray(rows.float().numpy()).tobytes())

    def rows(self) -> Rows:
        """What was written; closes the file."""
        self._file.close()
        return Rows(self.path, self.dim)

"""Who reads which sample when: pure integer arithmetic over (seed, epoch, shard sizes).

The order of samples never depends on the number of ranks or loader workers. In each epoch the
shards are permuted and laid end to end; that sequence of N samples is cut into `lanes` contiguous
runs (the first N % lanes of them one longer), and each run is shuffled in windows. Position p of
the epoch is sample p // lanes of lane p % lanes, so every lane is read in sequence, and one rank of
a world whose size divides `lanes` reads its own lanes only. Step t of the epoch covers positions
[t * B, min((t + 1) * B, N)); rank r takes those with p % world == r, so its share may be one larger
than another rank's. Any step of any epoch is
direct arithmetic: resuming replays nothing.

Random choices come from numpy's counter-based Philox, keyed by what is chosen, so no result depends
on the order of calls. Only its raw bits are used: they stay the same in every version of numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import factorial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RankStep:
    """What one rank reads in one step."""

    epoch: int
    shards: Integers
    """Shard of each sample, in the order of the global batch; empty where the last batch of an
    epoch has fewer samples than the world has ranks."""
    rows: Integers
    """Row of each sample in its shard."""
    weight: float
    """samples of this rank * world / samples of the global batch: the mean over the ranks of
    weight * mean loss is the mean over the global batch."""
    filler: tuple[int, int] | None
    """Where there are no samples: (shard, row) of one to run with weight 0, so that no rank waits
    for others."""

    @property
    def samples(self) -> tuple[tuple[int, int], ...]:
        """(shard, row) of each sample."""
        return tuple(zip(self.shards.tolist(), self.rows.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The order in which the samples of one split are consumed."""

    shard_samples: Integers | Sequence[int]
    """Samples of each shard, in the order of the manifest; kept as an array."""
    seed: int
    """Of every random choice, >= 0."""
    global_batch: int
    """Samples a step over all ranks together."""
    lanes: int = 48
    """Runs an epoch is cut into; a world size must divide it."""
    window: int = 256
    """Samples within which a run is shuffled."""

    def __post_init__(self) -> None:
        if self.samples == 0 or self._sizes.min() < 0:
            raise ValueError(f"no samples to plan for: shard_samples is {self.shard_samples}")
        for name, low in (("seed", 0), ("global_batch", 1), ("lanes", 1), ("window", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, not {getattr(self, name)}")

    @cached_property
    def samples(self) -> int:
        """Samples an epoch, N."""
        return int(self._sizes.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Steps an epoch; its last batch may be smaller than the others."""
        return -(-self.samples // self.global_batch)

    def samples_of(self, step: int, rank: int = 0, world: int = 1) -> RankStep:
        """What `rank` of `world` ranks reads at global step `step`.

        Args:
            step: from 0 over all epochs.
            rank: in 0..world - 1.
            world: number of ranks; divides `lanes`, at most `global_batch`.

        Raises:
            ValueError: an impossible world, rank or step.
        """
        check_world(world, self.lanes, self.global_batch)
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0..{world - 1}, not {rank}")
        if step < 0:
            raise ValueError(f"step must be >= 0, not {step}")
        epoch, t = divmod(step, self.steps_per_epoch)
        first = t * self.global_batch
        last = min(first + self.global_batch, self.samples)
        shards, rows = self._at(epoch, np.arange(first + (rank - first) % world, last, world))
        filler = None
        if not len(rows):
            (shard,), (row,) = self._at(epoch, np.arange(first, first + 1))
            filler = int(shard), int(row)
        return RankStep(epoch, shards, rows, len(rows) * world / (last - first), filler)

    @cached_property
    def _sizes(self) -> Integers:
        return np.asarray(self.shard_samples, np.int64)

    def _at(self, epoch: int, positions: Integers) -> tuple[Integers, Integers]:
        """Shard and row of each position of the epoch."""
        order, ends = self._shard_order(epoch)
        places = self._places(epoch, positions)
        nth = np.searchsorted(ends, places, side="right")
        shards = order[nth]
        return shards, places - ends[nth] + self._sizes[shards]

    def _shard_order(self, epoch: int) -> tuple[Integers, Integers]:
        """The epoch's order of the shards, and where each ends in the sequence that they make."""
        found = self._shard_orders.get(epoch)
        if found is None:
            order = _random_order(len(self._sizes), self.seed, "shards", epoch)
            found = order, np.cumsum(self._sizes[order])
            self._shard_orders.clear()  # one epoch is read at a time
            self._shard_orders[epoch] = found
        return found

    @cached_property
    def _shard_orders(self) -> dict[int, tuple[Integers, Integers]]:
        return {}

    def _places(self, epoch: int, positions: Integers) -> Integers:
        """Places of an epoch's positions in the sequence of its permuted shards."""
        offsets, lanes = np.divmod(positions, self.lanes)
        numbers, within = np.divmod(offsets, self.window)
        windows, which = np.unique(numbers * self.lanes + lanes, return_inverse=True)
        orders = [self._window_order(epoch, window) for window in windows.tolist()]
        begins = np.cumsum([0, *map(len, orders)])[which]
        shuffled = np.concatenate([np.zeros(0, np.int64), *orders])[begins + within]
        places: Integers = self._lane_starts(lanes) + numbers * self.window + shuffled
        return places

    def _lane_starts(self, lanes: Integers) -> Integers:
        length, longer = divmod(self.samples, self.lanes)
        starts: Integers = np.minimum(lanes, longer) + lanes * length
        return starts

    def _window_order(self, epoch: int, window: int) -> Integers:
        """Order in a window; they are counted over all lanes, those that begin a lane first."""
        number, lane = divmod(window, self.lanes)
        length, longer = divmod(self.samples, self.lanes)
        size = min(self.window, length + (lane < longer) - number * self.window)
        return _window_order(size, self.seed, epoch, lane, number)


def check_world(world: int, lanes: int, global_batch: int) -> None:
    """Refuse a number of ranks that cannot share the lanes, or has more ranks than samples a step.

    Raises:
        ValueError: names the numbers that can.
    """
    if 1 <= world <= global_batch and lanes % world == 0:
        return
    allowed = [n for n in range(1, min(lanes, global_batch) + 1) if lanes % n == 0]
    raise ValueError(
        f"{world} ranks cannot share {lanes} lanes and a global batch of {global_batch}; "
        f"possible: {', '.join(map(str, allowed))}"
    )


def caption_index(seed: int, epoch: int, key: str, count: int) -> int:
    """Which of a sample's `count` captions is used in this epoch.

    In the epochs k * count .. (k + 1) * count - 1 each caption comes once, in an order drawn anew
    for each sample and each k.

    Raises:
        ValueError: `count` is not positive.
    """
    if count == 1:
        return 0
    if count < 1:
        raise ValueError(f"a sample needs at least one caption, got {count}")
    turn, within = divmod(epoch, count)
    digest = hashlib.blake2b(f"{seed}/{turn}/{key}".encode()).digest()
    bits = int.from_bytes(digest, "little")  # 512 bits: enough to shuffle 98 captions evenly
    if count <= _FEW:  # the same order, looked up
        return _shuffled(bits % factorial(count), count)[within]
    return _shuffled.__wrapped__(bits, count)[within]


_FEW = 6
"""Of so few captions all orders, 720 at most, are kept."""


@lru_cache(maxsize=1024)
def _shuffled(bits: int, count: int) -> tuple[int, ...]:
    """The order of `count` things that these bits choose; only bits mod count! count."""
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        bits, j = divmod(bits, i + 1)
        order[i], order[j] = order[j], order[i]
    return tuple(order)


@lru_cache(maxsize=1024)
def _window_order(size: int, seed: int, epoch: int, lane: int, number: int) -> Integers:
    return _random_order(size, seed, "window", epoch, lane, number)


def _random_order(size: int, *key: int | str) -> Integers:
    """A permutation of 0..size - 1 that depends on nothing but its arguments."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size)
    return np.argsort(bits, kind="stable")

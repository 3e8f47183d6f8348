"""Who reads which sample when: pure integer arithmetic over (seed, epoch, shard sizes).

The order of samples never depends on the number of workers. In each epoch the shards are permuted
and laid end to end; that sequence of N samples is cut into `lanes` contiguous runs (the first
N % lanes of them one longer), and each run is shuffled in windows. Position p of the epoch is
sample p // lanes of lane p % lanes, so every lane is read in sequence, and one rank of a world
whose size divides `lanes` reads its own lanes only. Step t of the epoch covers positions
[t * B, min((t + 1) * B, N)); rank r takes those with p % world == r. Any step of any epoch is
direct arithmetic: resuming replays nothing.

Random choices come from numpy's counter-based Philox, keyed by what is chosen, so no result depends
on the order of calls. Only its raw bits are used: they stay the same in every version of numpy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RankStep:
    """What one rank reads in one step."""

    epoch: int
    samples: tuple[tuple[int, int], ...]
    """(shard, row in it), in the order of the global batch; empty where the last batch of an epoch
    has fewer samples than the world has ranks."""
    weight: float
    """samples of this rank * world / samples of the global batch: the mean over the ranks of
    weight * mean loss is the mean over the global batch."""
    filler: tuple[int, int] | None
    """Where `samples` is empty: a sample to run with weight 0, so that no rank waits for others."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order in which the samples of one split are consumed."""

    shard_samples: tuple[int, ...]
    """Samples of each shard, in the order of the manifest."""
    seed: int
    """Of every random choice, >= 0."""
    global_batch: int
    """Samples a step over all ranks together."""
    lanes: int = 48
    """Runs an epoch is cut into; a world size must divide it."""
    window: int = 256
    """Samples within which a run is shuffled."""

    def __post_init__(self) -> None:
        if self.samples == 0 or min(self.shard_samples) < 0:
            raise ValueError(f"no samples to plan for: shard_samples is {self.shard_samples}")
        for name, low in (("seed", 0), ("global_batch", 1), ("lanes", 1), ("window", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, not {getattr(self, name)}")

    @cached_property
    def samples(self) -> int:
        """Samples an epoch, N."""
        return sum(self.shard_samples)

    @property
    def steps_per_epoch(self) -> int:
        """Steps an epoch; its last batch may be smaller than the others."""
        return -(-self.samples // self.global_batch)

    def samples_of(self, step: int, rank: int = 0, world: int = 1) -> RankStep:
        """What `rank` of `world` ranks reads at global step `step`.

        Args:
            step: from 0 over all epochs.
            rank: in 0..world - 1.
            world: number of ranks; divides `lanes` and `global_batch`.

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
        # `world` divides `first`, so the first position of rank r is r further on.
        samples = self._at(epoch, range(first + rank, last, world))
        filler = None if samples else self._at(epoch, range(first, first + 1))[0]
        return RankStep(epoch, samples, len(samples) * world / (last - first), filler)

    def _at(self, epoch: int, positions: range) -> tuple[tuple[int, int], ...]:
        """(shard, row) of each position of the epoch."""
        order, ends = self._shard_order(epoch)
        places = np.array([self._place(epoch, p) for p in positions], np.int64)
        nth = np.searchsorted(ends, places, side="right")
        shards = order[nth]
        starts = np.where(nth > 0, ends[nth - 1], 0)
        return tuple(zip(shards.tolist(), (places - starts).tolist(), strict=True))

    def _shard_order(self, epoch: int) -> tuple[Integers, Integers]:
        """The epoch's order of the shards, and where each ends in the sequence that they make."""
        if epoch not in self._shard_orders:
            self._shard_orders.clear()  # one epoch is read at a time
            order = _random_order(len(self.shard_samples), self.seed, "shards", epoch)
            ends = np.cumsum(np.array(self.shard_samples, np.int64)[order])
            self._shard_orders[epoch] = order, ends
        return self._shard_orders[epoch]

    @cached_property
    def _shard_orders(self) -> dict[int, tuple[Integers, Integers]]:
        return {}

    def _place(self, epoch: int, position: int) -> int:
        """Place of an epoch's position in the sequence of its permuted shards."""
        offset, lane = divmod(position, self.lanes)
        length, longer = divmod(self.samples, self.lanes)
        start = lane * length + min(lane, longer)
        length += lane < longer
        number, within = divmod(offset, self.window)
        size = min(self.window, length - number * self.window)
        order = _window_order(size, self.seed, epoch, lane, number)
        return start + number * self.window + int(order[within])


def check_world(world: int, lanes: int, global_batch: int) -> None:
    """Refuse a number of ranks that cannot share the lanes and the global batch evenly.

    Raises:
        ValueError: names the numbers that can.
    """
    if world >= 1 and lanes % world == 0 and global_batch % world == 0:
        return
    allowed = [n for n in range(1, lanes + 1) if lanes % n == 0 and global_batch % n == 0]
    raise ValueError(
        f"{world} ranks cannot share {lanes} lanes and a global batch of {global_batch} evenly; "
        f"possible: {', '.join(map(str, allowed))}"
    )


def caption_index(seed: int, epoch: int, key: str, count: int) -> int:
    """Which of a sample's `count` captions is used in this epoch.

    In the epochs k * count .. (k + 1) * count - 1 each caption comes once, in an order drawn anew
    for each sample and each k.

    Raises:
        ValueError: `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"a sample needs at least one caption, got {count}")
    if count == 1:
        return 0
    turn, within = divmod(epoch, count)
    digest = hashlib.blake2b(f"{seed}/{turn}/{key}".encode()).digest()
    bits = int.from_bytes(digest, "little")  # 512 bits: enough to shuffle 98 captions evenly
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        bits, j = divmod(bits, i + 1)
        order[i], order[j] = order[j], order[i]
    return order[within]


@lru_cache(maxsize=1024)
def _window_order(size: int, seed: int, epoch: int, lane: int, number: int) -> Integers:
    return _random_order(size, seed, "window", epoch, lane, number)


def _random_order(size: int, *key: int | str) -> Integers:
    """A permutation of 0..size - 1 that depends on nothing but its arguments."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size)
    return np.argsort(bits, kind="stable")

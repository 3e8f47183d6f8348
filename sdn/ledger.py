"""The ledger of a training: which samples each step really consumed, and the proof it allows.

Each rank notes the keys of every batch after the step that consumed it; each attempt (a start of
the training, the first or one after a failure) notes where it went on. So the lineage of steps that
leads to the final weights is known, and whether it saw every sample once an epoch.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from heapq import merge
from itertools import chain, groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from sdn.journal import journal_files, read_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sdn.data.files import Files

LEDGER, ATTEMPTS = "ledger", "attempts"
_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of a training."""

    number: int
    """From 0."""
    start: int
    """Global step from which it went on."""
    world: int
    """Ranks."""
    steps: int = 0
    """Steps that its ledger holds, those rolled back later among them."""
    rolled_back: int = 0
    """Of these, steps that a later attempt did again from an earlier checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What the ledger of a training says."""

    steps: int
    """Steps of the lineage that leads to the last one."""
    samples: int
    """Samples consumed along it."""
    epochs: int
    """Whole epochs along it."""
    lost: int
    """Samples of whole epochs that no step of the lineage consumed, and steps without a line."""
    twice: int
    """Samples that the lineage consumed more than once in an epoch."""
    rolled_back: int
    """Steps that were done again after a failure; their samples are counted once."""
    attempts: tuple[Attempt, ...]
    problems: tuple[str, ...]
    """The first of what is wrong, in words; empty where all is well."""


def ledger_prefix(attempt: int, rank: int) -> str:
    """Prefix of the journal that a rank keeps in an attempt."""
    return f"{LEDGER}/{attempt:04d}-{rank:04d}"


def note_attempt(files: Files, *, start: int, world: int, about: dict[str, Any]) -> int:
    """Note a new attempt and return its number; called by rank 0."""
    numbers = [attempt.number for attempt in attempts_of(files)]
    number = max(numbers, default=-1) + 1
    entry = {"number": number, "start": start, "world": world, "about": about}
    files.write(f"{ATTEMPTS}/{number:04d}.json", json.dumps(entry).encode())
    return number


def attempts_of(files: Files) -> list[Attempt]:
    """The attempts of a training in their order."""
    found = []
    for info in files.walk(ATTEMPTS):
        entry = json.loads(files.read(info.name))
        found.append(Attempt(number=entry["number"], start=entry["start"], world=entry["world"]))
    return sorted(found, key=lambda attempt: attempt.number)


def audit(
    files: Files, keys: Iterable[str], *, steps_per_epoch: int, steps: int, left_out: int = 0
) -> Audit:
    """Follow the ledger along the lineage that leads to step `steps`.

    Memory grows with the samples of an epoch, not with the length of the training.

    Args:
        files: the place of the training.
        keys: of all samples that an epoch should consume, from the data set itself.
        steps_per_epoch: global steps.
        steps: of the training up to where it is followed.
        left_out: samples that each epoch leaves out, where only whole batches are taken.

    Raises:
        ValueError: a file of the ledger is damaged.
    """
    expected = frozenset(keys)
    attempts = attempts_of(files)
    problems = _Problems()
    seen: Counter[str] = Counter()
    samples = epochs = lost = twice = 0
    reached: Counter[int] = Counter()
    for attempt, first, end in _lineage(attempts, steps):
        for step, ranks, consumed in _steps(files, attempt, first, end):
            if ranks != attempt.world:
                lost += 1
                problems.add(f"step {step} has the lines of {ranks} of {attempt.world} ranks")
            reached[attempt.number] += ranks > 0
            samples += len(consumed)
            seen.update(consumed)
            if (step + 1) % steps_per_epoch == 0:
                epoch = step // steps_per_epoch
                missing = sorted(expected - seen.keys())[left_out:]
                doubled = {key: n for key, n in seen.items() if n > 1 or key not in expected}
                lost, epochs = lost + len(missing), epochs + 1
                twice += sum(max(1, n - 1) for n in doubled.values())
                for key in missing[:_SHOWN]:
                    problems.add(f"epoch {epoch}: no step consumed {key}")
                for key in sorted(doubled)[:_SHOWN]:
                    problems.add(f"epoch {epoch}: {key} came {doubled[key]} times")
                seen.clear()
    for key, n in sorted(seen.items()):  # of the epoch that is not whole yet
        if n > 1:
            twice += n - 1
            problems.add(f"the last epoch: {key} came {n} times")
    counted = [_count(files, attempt, reached[attempt.number]) for attempt in attempts]
    return Audit(
        steps=steps,
        samples=samples,
        epochs=epochs,
        lost=lost,
        twice=twice,
        rolled_back=sum(attempt.rolled_back for attempt in counted),
        attempts=tuple(counted),
        problems=problems.first,
    )


def _lineage(attempts: list[Attempt], steps: int) -> Iterator[tuple[Attempt, int, int]]:
    """Which attempt did which steps (first, end) of those that led to `steps`, in their order."""
    end, found = steps, []
    for attempt in reversed(attempts):
        if attempt.start < end:
            found.append((attempt, attempt.start, end))
            end = attempt.start
    yield from reversed(found)


def _steps(
    files: Files, attempt: Attempt, first: int, end: int
) -> Iterator[tuple[int, int, list[str]]]:
    """(step, ranks that noted it, keys that they consumed) of each step from `first` to `end`."""
    lines = _lines(files, attempt)
    line = next(lines, None)
    for step in range(first, end):
        ranks, keys = 0, []
        while line is not None and line["step"] <= step:
            if line["step"] == step:
                ranks += 1
                keys.extend(line["keys"])
            line = next(lines, None)
        yield step, ranks, keys


def _count(files: Files, attempt: Attempt, kept: int) -> Attempt:
    """The attempt with its steps, `kept` of which are of the lineage."""
    noted = sum(1 for _ in groupby(_lines(files, attempt), key=itemgetter("step")))
    return dataclasses.replace(attempt, steps=noted, rolled_back=noted - kept)


def _lines(files: Files, attempt: Attempt) -> Iterator[dict[str, Any]]:
    """What all ranks of an attempt noted, in the order of the steps; a file a rank in memory."""
    ranks: dict[int, list[str]] = {}
    for name, rank in _files_of(files, attempt):
        ranks.setdefault(rank, []).append(name)
    return merge(
        *(
            chain.from_iterable(read_lines(files, name) for name in names)
            for names in ranks.values()
        ),
        key=itemgetter("step"),
    )


def _files_of(files: Files, attempt: Attempt) -> Iterator[tuple[str, int]]:
    """A ledger's files of an attempt, each with the rank that wrote it."""
    for name in journal_files(files, LEDGER):
        number, rank, _ = name.removeprefix(f"{LEDGER}/").split("-")
        if int(number) == attempt.number:
            yield name, int(rank)


class _Problems:
    """The first few of them."""

    def __init__(self) -> None:
        self.first: tuple[str, ...] = ()

    def add(self, text: str) -> None:
        if len(self.first) < _SHOWN:
            self.first += (text,)

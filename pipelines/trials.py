"""The search's own ledger: which values were tried, how far each trial is, and how it stands.

One file a trial, each written whole: whatever is killed, no result is forgotten, and what was begun
and not ended is begun again with the same values. Ray Tune's own state is not read.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sdn.config import SearchConfig
    from sdn.data.files import Files

State = Literal["running", "finished", "stopped", "failed"]
TRIALS, WORK, SPENT = "trials", "work", "spent.json"
"""Below the search's place: records, what trials keep while they run, and the time used up."""


@dataclass(kw_only=True)
class Trial:
    """One set of values and what became of it."""

    number: int
    """From 0, in the order of their start; 0 has the recipe's own values."""
    values: dict[str, float]
    """Name (see `sdn.space`) -> value."""
    state: State = "running"
    """running: begun. finished: at its full (short) length. stopped: behind at a rung, or out of
    time. failed: see `reason`."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """At each rung: images_seen, value, low, high, seconds, parts (file, see
    `sdn.validation.pack_parts`) and, where they changed on the way, values."""
    reason: str | None = None
    """Why it failed, or was stopped."""

    @property
    def ended(self) -> bool:
        """Whether it is not to be run again."""
        return self.state != "running"

    @property
    def value(self) -> float | None:
        """Its score at the last rung."""
        return self.points[-1]["value"] if self.points else None

    @property
    def images_seen(self) -> int:
        """At the last rung."""
        return self.points[-1]["images_seen"] if self.points else 0

    @property
    def seconds(self) -> float:
        """Of training, all rungs together."""
        return float(sum(point["seconds"] for point in self.points))

    def add(self, point: dict[str, Any]) -> None:
        """Note a rung; the same one again takes the place of the first."""
        seen = point["images_seen"]
        self.points = [*(p for p in self.points if p["images_seen"] < seen), point]


class TrialLedger:
    """The trials of one search, in its place."""

    def __init__(self, files: Files, besides: Collection[int] = ()) -> None:
        """Args:
        files: the search's place.
        besides: numbers of trials that are not read.

        Raises:
            ValueError: a record is damaged.
        """
        self._files = files
        self.trials: dict[int, Trial] = {}
        known = {_name(number) for number in besides}
        for name in sorted(info.name for info in files.walk(TRIALS)):
            if name.endswith(".json") and name not in known:
                trial = _read(files, name)
                self.trials[trial.number] = trial
        self.spent_s = 0.0
        """Time used up by trials, in all attempts together."""
        if files.exists(SPENT):
            self.spent_s = _spent(files)

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps what it is given with the experiment; the ledger belongs to this process.
        return {"trials": self.trials, "spent_s": self.spent_s}

    def all(self) -> list[Trial]:
        """In the order of their numbers."""
        return [self.trials[number] for number in sorted(self.trials)]

    def open(self) -> list[Trial]:
        """Those begun and not ended."""
        return [trial for trial in self.all() if not trial.ended]

    def write(self, trial: Trial) -> None:
        """Put down how a trial stands, whole."""
        self.trials[trial.number] = trial
        content = json.dumps(dataclasses.asdict(trial), indent=1).encode()
        self._files.write(_name(trial.number), content)

    def spend(self, seconds: float) -> None:
        """Put down the time used up so far."""
        self.spent_s = seconds
        self._files.write(SPENT, json.dumps({"seconds": round(seconds, 1)}).encode())

    def remove(self, name: str) -> None:
        """Remove a file of the search's place."""
        self._files.remove(name)

    def clear_checkpoints(self, number: int | None = None) -> None:
        """Remove what a trial that has ended would have gone on from; None: at the end, all."""
        for info in list(self._files.walk(WORK if number is None else f"{WORK}/{number:04d}")):
            if "/checkpoints/" in info.name:
                self._files.remove(info.name)


def _name(number: int) -> str:
    return f"{TRIALS}/{number:04d}.json"


def _read(files: Files, name: str) -> Trial:
    try:
        trial = Trial(**json.loads(files.read(name)))
        whole = (
            name == _name(trial.number)
            and isinstance(trial.values, dict)
            and trial.state in get_args(State)
            and all({"images_seen", "value", "seconds"} <= point.keys() for point in trial.points)
        )
        problem = "" if whole else "number, values, state and points are not those of this trial"
    except (ValueError, TypeError, AttributeError) as error:
        problem = str(error)
    if problem:
        raise ValueError(
            f"{files.uri}/{name} is damaged ({problem}): delete it, and the trial is run again"
        )
    return trial


def _spent(files: Files) -> float:
    try:
        return float(json.loads(files.read(SPENT))["seconds"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{files.uri}/{SPENT} is damaged ({error!r}): delete it, and the time for trials is "
            "counted anew"
        ) from error


def lower_is_better(search: SearchConfig) -> bool:
    """Whether the score that trials are ranked on is an error."""
    return search.score == "kid"


def order_of_merit(trials: Sequence[Trial], search: SearchConfig) -> list[Trial]:
    """Trials with a score: those that came furthest first, the best of them first."""
    sign = 1 if lower_is_better(search) else -1
    scored = [trial for trial in trials if trial.value is not None and trial.state != "failed"]
    return sorted(scored, key=lambda t: (-t.images_seen, sign * (t.value or 0.0), t.number))

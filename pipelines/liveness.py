"""Which flow runs that claim to run are dead: decided from evidence alone, without any effect.

A run that is slow, silent or far away is not dead. Three things count as evidence:

1. The process that its record names is looked for on this machine, and is not there.
2. Its record lies on this machine's last boot, and is not renewed.
3. Nothing at all is heard of it for a long time, through which the server answered every question.

The third is for runs on other machines, whose processes cannot be looked for. Time is counted here,
by a clock that cannot be set, and only while this machine was awake and the server was there:
nobody else's clock enters, and what could not be observed counts as never having been silent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.processes import Life, ProcessName

if TYPE_CHECKING:
    from collections.abc import Sequence

CLAIMING = ("RUNNING", "PENDING", "CANCELLING")
"""Types of the states in which a flow run claims that something works for it."""
BEAT_EVERY_S = 15.0
"""Seconds between two renewals of a run's record."""


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """The record that a flow run keeps of itself on the server."""

    process: ProcessName
    run_count: int
    """Prefect's count of the times the run has begun: a record of an earlier time says nothing."""
    beat: int
    """Raised with each renewal."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A flow run that claims to run, as one look shows it."""

    run: str
    """Id."""
    state: str
    """Type of its state, one of `CLAIMING`."""
    state_id: str
    run_count: int
    pulse: Pulse | None = None
    life: Life = Life.ELSEWHERE
    """Of the record's process; looked for before the server was asked for the state."""
    worker_beat: str | None = None
    """What the server last heard of the worker that took the run: it changes while that lives.
    None where none took it, or nobody knows which."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a look took place."""

    steady_s: float
    """By a clock that cannot be set and may stand still while the machine sleeps."""
    wall_s: float
    """By the clock on the wall."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What counts as evidence."""

    silence_s: float = 600.0
    """Seconds without a new record, of a run that cannot be looked at."""
    start_s: float = 180.0
    """Seconds without any record, of a run whose worker is not heard of for as long."""
    reboot_s: float = 3 * BEAT_EVERY_S
    """Seconds without a new record, of a run of this machine's earlier boot."""
    gap_s: float = 60.0
    """Seconds between two looks above which nobody knows what was in between."""
    jump_s: float = 5.0
    """Seconds by which the two clocks may part between two looks."""
    looks: int = 2
    """Looks in a row that must find the process gone: one that ends well says so first."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A run that is dead."""

    claim: Claim
    why: str
    """For people; follows "the run is dead: "."""


@dataclass(kw_only=True)
class _Memory:
    """What was seen of a run for as long as nothing about it changed."""

    claim: Claim
    since_s: float
    worker_since_s: float
    """Since when its worker was not heard of anew."""
    gone: int = 0
    """Looks in a row that found its process gone."""


class Watch:
    """Judges one look after another; remembers only what it has seen itself.

    Args:
        limits: what counts as evidence.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._last: Moment | None = None
        self._seen: dict[str, _Memory] = {}

    def look(self, moment: Moment, claims: Sequence[Claim] | None) -> list[Verdict]:
        """Who is dead, as of this look.

        Args:
            moment: when the look began.
            claims: every run that claims to run; None where the server did not answer.

        Returns:
            The dead; never one of which there was only a single look.
        """
        if claims is None or not self._unbroken(moment):
            self._seen.clear()
        self._last = moment
        if claims is None:
            return []
        before, self._seen = self._seen, {}
        for claim in claims:
            self._seen[claim.run] = _remember(before.get(claim.run), claim, moment.steady_s)
        judged = ((memory, self._why(memory, moment.steady_s)) for memory in self._seen.values())
        return [Verdict(claim=memory.claim, why=why) for memory, why in judged if why]

    def _unbroken(self, moment: Moment) -> bool:
        """Whether nothing can have stood still or been away since the look before."""
        if self._last is None:
            return True
        steady = moment.steady_s - self._last.steady_s
        wall = moment.wall_s - self._last.wall_s
        return 0 <= steady <= self.limits.gap_s and abs(wall - steady) <= self.limits.jump_s

    def _why(self, memory: _Memory, now_s: float) -> str:
        """Why a run is dead; "" where it may live."""
        claim, limits = memory.claim, self.limits
        silent_s = now_s - memory.since_s
        pulse = valid_pulse(claim)
        if pulse is None:
            offline_s = 0.0 if claim.worker_beat is None else now_s - memory.worker_since_s
            dead = min(offline_s, silent_s) >= limits.start_s
            return "its worker is gone, and no process of it has begun" if dead else ""
        who = f"process {pulse.process.pid} of {pulse.process.host}"
        evidence = {
            Life.ALIVE: (False, ""),
            Life.GONE: (memory.gone >= limits.looks, f"{who} is gone"),
            Life.REBOOTED: (silent_s >= limits.reboot_s, f"{who} ended with the machine"),
            Life.ELSEWHERE: (
                silent_s >= limits.silence_s,
                f"nothing was heard of {who} for {silent_s:.0f} s",
            ),
        }
        dead, why = evidence[claim.life]
        return why if dead else ""


def valid_pulse(claim: Claim) -> Pulse | None:
    """The record of what the state speaks of; None where there is none, or one of an earlier time.

    A run that waits for a process (PENDING) can only have an earlier one.
    """
    pulse = claim.pulse
    if pulse is None or claim.state == "PENDING" or pulse.run_count != claim.run_count:
        return None
    return pulse


def _remember(memory: _Memory | None, claim: Claim, now_s: float) -> _Memory:
    """The memory of a run after one more look."""
    if memory is None:
        memory = _Memory(claim=claim, since_s=now_s, worker_since_s=now_s)
    if _changing(memory.claim) != _changing(claim):
        memory.since_s, memory.gone = now_s, 0
    if memory.claim.worker_beat != claim.worker_beat:
        memory.worker_since_s = now_s
    memory.claim = claim
    memory.gone = memory.gone + 1 if claim.life is Life.GONE else 0
    return memory


def _changing(claim: Claim) -> tuple[object, ...]:
    """What changes while a run lives."""
    return claim.state_id, claim.run_count, claim.pulse

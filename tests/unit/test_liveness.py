"""Who is dead and who is only slow: 1,000 simulated runs, and the rules one by one."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.liveness import BEAT_EVERY_S, Claim, Limits, Moment, Pulse, Watch
from pipelines.processes import Life, ProcessName

EVERY_S = 10.0
LIMITS = Limits(gap_s=3 * EVERY_S + 30)
HERE, AWAY = "here", "away"


def process(pid=1):
    return ProcessName(host="h", machine="m", boot="b", space="s", pid=pid, started="1")


def claim(**changes):
    """A run at work, far away, with a record."""
    about = {"run": "r", "state": "RUNNING", "state_id": "s1", "run_count": 1}
    about["pulse"] = Pulse(process=process(), run_count=1, beat=1)
    return Claim(**(about | changes))


def looks(watch, claims, seconds, start=0.0, every=EVERY_S):
    """What a watch finds when it sees the same for a while."""
    found, at = [], start
    while at <= start + seconds:
        found += watch.look(Moment(steady_s=at, wall_s=1e9 + at), claims)
        at += every
    return found


@dataclasses.dataclass
class Simulated:
    """A run of a simulated world; times in seconds of the world's own, true clock."""

    name: str
    place: str
    claimed: float
    """A worker takes it: PENDING."""
    begins: float
    """RUNNING, and at once its first record, if the server is there."""
    ends: float
    """COMPLETED, or SIGKILL with its worker."""
    killed: bool
    draw: random.Random
    worker_dies: float
    """Its worker may die alone: the run goes on without."""
    beat: int = 0
    next_beat: float = 0.0

    def step(self, now, *, server):
        """Renew the record where it is time and the server is there."""
        if now < self.begins or now >= self.ends or now < self.next_beat or not server:
            return
        self.beat += 1
        held = self.draw.random()
        # Jitter; now and then something holds the interpreter, or the connection, for minutes.
        pause = BEAT_EVERY_S * self.draw.uniform(0.8, 2) if held < 0.97 else held * 500
        self.next_beat = now + pause

    def seen(self, now):
        """The run as a look at this moment shows it; None where it does not claim to run."""
        if now < self.claimed or (now >= self.ends and not self.killed):
            return None
        alive = now < self.ends
        pulse = Pulse(process=process(), run_count=1, beat=self.beat) if self.beat else None
        life = (Life.ALIVE if alive else Life.GONE) if self.place == HERE else Life.ELSEWHERE
        return Claim(
            run=self.name,
            state="PENDING" if now < self.begins else "RUNNING",
            state_id="p" if now < self.begins else "r",
            run_count=int(now >= self.begins),
            pulse=pulse,
            life=life if pulse else Life.ELSEWHERE,
            worker_beat=str(min(now, self.worker_dies) // 30),
        )


def world(seed, runs, *, killed):
    """Simulated runs of an afternoon; of the killed ones each dies in mid-run, its worker too."""
    draw = random.Random(seed)
    found = []
    for n in range(runs):
        claimed = draw.uniform(0, 6000)
        begins = claimed + draw.uniform(2, 150)
        place = draw.choice([HERE, AWAY])
        ends = begins + (draw.uniform(0, 4000) if killed else draw.expovariate(1 / 2000))
        alone = not killed and draw.random() < 0.3
        worker_dies = draw.uniform(claimed, 8000) if alone else ends if killed else float("inf")
        found.append(Simulated(f"run {n}", place, claimed, begins, ends, killed, draw, worker_dies))
    return found


def watched(runs, seed, *, calm=False, until=12000.0):
    """What a reconciler says of them, with the world's time; the world is not kind to it.

    The server is away now and then, the machine sleeps, its clock jumps, looks come late.
    """
    draw = random.Random(seed)
    watch, verdicts = Watch(LIMITS), {}
    now = steady = 0.0
    wall, away_until = 1e9, 0.0
    while now < until:
        late = draw.uniform(0, 5) + (draw.uniform(0, 40) if draw.random() < 0.05 else 0)
        passed = EVERY_S + late
        asleep = draw.uniform(60, 4000) if not calm and draw.random() < 0.003 else 0.0
        for seconds in range(0, int(passed + asleep), 3):
            at = now + seconds
            for run in runs:
                # A machine that sleeps takes its own runs along; those elsewhere go on.
                if not (asleep and run.place == HERE):
                    run.step(at, server=at >= away_until)
        now, steady, wall = now + passed + asleep, steady + passed, wall + passed + asleep
        if not calm and draw.random() < 0.01:
            wall += draw.choice([-3600, -30, 30, 3600])
        if not calm and draw.random() < 0.01:
            away_until = now + draw.uniform(5, 900)
        seen = None
        if now >= away_until:
            seen = [one for run in runs if (one := run.seen(now)) is not None]
        for verdict in watch.look(Moment(steady_s=steady, wall_s=wall), seen):
            verdicts.setdefault(verdict.claim.run, now)
    return verdicts


@pytest.mark.parametrize("seed", range(4))
def test_no_healthy_run_is_ever_found_dead(seed):
    """1,000 healthy runs, through jitter, outages, sleep, clock jumps and held locks: none."""
    runs = world(seed, 250, killed=False)
    assert watched(runs, seed) == {}
    assert sum(run.beat for run in runs) > 1000


def test_every_dead_run_is_found_in_time():
    """Here by the second look after its death; elsewhere after the time of silence; all of them."""
    runs = world(7, 100, killed=True)
    verdicts = watched(runs, 7, calm=True)
    longest = {HERE: 2 * (EVERY_S + 45), AWAY: LIMITS.silence_s + 2 * (EVERY_S + 45)}
    for run in runs:
        limit = longest[run.place] if run.beat else LIMITS.start_s + 2 * (EVERY_S + 45)
        assert run.ends <= verdicts[run.name] <= run.ends + limit, run


def test_dead_runs_are_found_through_trouble_too():
    """Outages and sleep only make it later: at the end all are found, and none before its death."""
    runs = world(8, 60, killed=True)
    verdicts = watched(runs, 8, until=30000.0)
    assert all(verdicts[run.name] >= run.ends for run in runs)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(1, 200),  # until the next look
            st.floats(-5000, 5000),  # what the wall clock jumps
            st.sampled_from(["beat", "same", "away"]),
        ),
        max_size=60,
    )
)
def test_silence_is_only_what_was_observed(steps):
    """A run elsewhere is dead only after so long a stretch of good looks, all of them the same."""
    watch = Watch(LIMITS)
    steady = wall = 0.0
    beat, quiet_since = 1, None
    for passed, jump, what in steps:
        steady, wall = steady + passed, wall + passed + jump
        beat += what == "beat"
        broken = passed > LIMITS.gap_s or abs(jump) > LIMITS.jump_s
        if what == "away":
            quiet_since = None
        elif broken or what == "beat" or quiet_since is None:
            quiet_since = steady
        one = claim(pulse=Pulse(process=process(), run_count=1, beat=beat))
        found = watch.look(Moment(steady_s=steady, wall_s=wall), None if what == "away" else [one])
        if found:
            assert quiet_since is not None
            assert steady - quiet_since >= LIMITS.silence_s


def test_a_process_that_is_gone_needs_two_looks():
    """One look may fall between the end of a process and the word of it."""
    watch = Watch(LIMITS)
    assert looks(watch, [claim(life=Life.GONE)], 0) == []
    (found,) = looks(watch, [claim(life=Life.GONE)], 0, start=10)
    assert found.why == "process 1 of h is gone"


@pytest.mark.parametrize(
    "change",
    [
        {"pulse": None},
        {"state": "PENDING", "life": Life.GONE},
        {"run_count": 2, "life": Life.GONE},
        {"life": Life.ALIVE},
    ],
    ids=["no record", "waits for a process", "another attempt", "alive"],
)
def test_what_is_no_evidence(change):
    """A record of an earlier attempt, or none, or a living process that is silent: never dead."""
    assert looks(Watch(LIMITS), [claim(**change)], 10000) == []


def test_a_run_that_never_began_needs_its_worker_gone():
    """PENDING for hours is no death while its worker is there: an image may be pulled."""
    left = claim(state="PENDING", pulse=None, worker_beat="08:00:30")
    watch, found = Watch(LIMITS), []
    for n in range(1000):
        heard = dataclasses.replace(left, worker_beat=str(n // 9))
        found += watch.look(Moment(steady_s=10.0 * n, wall_s=10.0 * n), [heard])
    assert found == []
    assert looks(Watch(LIMITS), [left], LIMITS.start_s - EVERY_S) == []
    assert looks(Watch(LIMITS), [left], LIMITS.start_s)[0].why.startswith("its worker is gone")


def test_a_reboot_needs_silence_too():
    """What looks like this machine's earlier boot may be its twin: only the silent are dead."""
    watch, found = Watch(LIMITS), []
    for n in range(60):
        one = claim(life=Life.REBOOTED, pulse=Pulse(process=process(), run_count=1, beat=n))
        found += watch.look(Moment(steady_s=10.0 * n, wall_s=10.0 * n), [one])
    assert found == []
    (found, *_) = looks(Watch(LIMITS), [claim(life=Life.REBOOTED)], LIMITS.reboot_s + EVERY_S)
    assert "ended with the machine" in found.why


def test_a_dead_run_is_found_again_until_it_is_settled():
    """A verdict that could not be carried out comes again at the next look."""
    assert len(looks(Watch(LIMITS), [claim(life=Life.GONE)], 3 * EVERY_S)) == 3

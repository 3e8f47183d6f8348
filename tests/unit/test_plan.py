import dataclasses
import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sdn.data.plan
from sdn.data.loader import worker_of
from sdn.data.plan import Plan, caption_index, check_world

LANES = (1, 2, 3, 4, 6, 8, 12, 48)
CASES = 10_000


def random_case(random):
    """A plan over uneven shards, a world size and a number of loader workers that it allows."""
    lanes = int(random.choice(LANES))
    world = int(random.choice([n for n in range(1, lanes + 1) if lanes % n == 0]))
    plan = Plan(
        shard_samples=np.append(random.integers(0, 12, random.integers(0, 8)), 1),
        seed=int(random.integers(2**40)),
        global_batch=world * int(random.integers(1, 1 + max(2, 24 // world))),
        lanes=lanes,
        window=int(random.integers(1, 10)),
    )
    return plan, world, int(random.integers(0, 5))


def in_workers(steps, start, workers):
    """The steps in the order in which the consumer gets them from the workers' queues."""
    if workers == 0:
        return list(steps)
    queues = [[s for s in steps if worker_of(s, start, workers) == n] for n in range(workers)]
    return [step for turn in itertools.zip_longest(*queues) for step in turn if step is not None]


def joined(plan, steps, world):
    """Global batches of these steps, put together from the shares of all ranks: shards, rows."""
    batches = []
    for step in steps:
        parts = [plan.samples_of(step, rank, world) for rank in range(world)]
        check_weights(plan, parts, world)
        whole = np.empty((2, sum(len(part.rows) for part in parts)), np.int64)
        for rank, part in enumerate(parts):
            whole[:, rank::world] = part.shards, part.rows
        batches.append(whole)
    return batches


def check_weights(plan, parts, world):
    total = sum(len(part.rows) for part in parts)
    assert len({part.epoch for part in parts}) == 1
    for part in parts:
        assert part.weight == len(part.rows) * world / total
        assert (part.filler is None) == (len(part.rows) > 0)
        assert total < plan.global_batch or part.weight == 1


def check_case(plan, world, workers, random):
    """One epoch from its beginning, then from somewhere in epochs 1 to 3, by a plan made anew."""
    each = plan.steps_per_epoch
    epoch = int(random.integers(0, 4))
    alone = [plan.samples_of(step) for step in range(epoch * each, (epoch + 1) * each)]
    steps = in_workers(range(epoch * each, (epoch + 1) * each), epoch * each, workers)
    ranks = joined(plan, steps, world)
    assert len(ranks) == len(alone)  # equal steps on every rank
    for one, whole in zip(alone, ranks, strict=True):
        assert np.array_equal(whole, (one.shards, one.rows))
    starts = np.cumsum(plan.shard_samples) - plan.shard_samples
    shards, rows = np.concatenate(ranks, axis=1)
    assert np.array_equal(np.sort(starts[shards] + rows), np.arange(plan.samples))
    assert (rows < np.asarray(plan.shard_samples)[shards]).all()

    resumed = int(random.integers(each, 4 * each))
    again = dataclasses.replace(plan)
    steps = in_workers(range(resumed, resumed + 2), resumed, workers)
    for step, whole in zip(range(resumed, resumed + 2), joined(again, steps, world), strict=True):
        one = plan.samples_of(step)
        assert np.array_equal(whole, (one.shards, one.rows))


@pytest.mark.parametrize("part", range(10))
def test_every_rank_and_worker_together_read_the_same_batches(part):
    """In 10,000 random cases of samples, shards, lanes, world sizes, workers and resume points.

    The global batches are those of one rank, each sample comes once an epoch, all ranks have
    equally many steps, and a plan that begins in the middle goes on alike.
    """
    for number in range(part, CASES, 10):
        random = np.random.default_rng(number)
        check_case(*random_case(random), random)


@pytest.mark.parametrize("part", range(10))
def test_worlds_that_do_not_fit_are_refused_with_those_that_do(part):
    """In 10,000 random cases a world is refused or fits, and those that are named fit."""
    for number in range(part, CASES, 10):
        random = np.random.default_rng(number)
        lanes, batch, world = (int(random.integers(1, top)) for top in (97, 500, 60))
        if lanes % world == 0 and world <= batch:
            check_world(world, lanes, batch)
            continue
        with pytest.raises(ValueError, match=f"{world} ranks") as caught:
            check_world(world, lanes, batch)
        named = str(caught.value).rpartition(": ")[2].split(", ")
        assert [int(n) for n in named] == [
            n for n in range(1, lanes + 1) if lanes % n == 0 and n <= batch
        ]


@st.composite
def plans(draw):
    """Plans over uneven shards."""
    return Plan(
        shard_samples=(*draw(st.lists(st.integers(0, 23), min_size=1, max_size=8)), 1),
        seed=draw(st.integers(0, 2**40)),
        global_batch=draw(st.integers(1, 40)),
        lanes=draw(st.sampled_from(LANES)),
        window=draw(st.integers(1, 9)),
    )


def test_a_late_epoch_needs_no_earlier_one(monkeypatch):
    """A step of epoch 3 draws the choices of epoch 3 and no others."""
    drawn = []
    real = sdn.data.plan._random_order
    monkeypatch.setattr(
        sdn.data.plan, "_random_order", lambda size, *key: drawn.append(key) or real(size, *key)
    )
    sdn.data.plan._window_order.cache_clear()
    plan = Plan(shard_samples=(30, 30, 30), seed=5, global_batch=8)
    plan.samples_of(3 * plan.steps_per_epoch + 4)
    assert drawn
    assert {key[2] for key in drawn} == {3}


@pytest.mark.parametrize("module", ["sdn.data.plan", "sdn.data.dataset"])
def test_planning_needs_no_torch(module):
    """A plan is made, and a manifest opened, without loading torch."""
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=100, deadline=None)
@given(plans())
def test_lanes_are_read_in_sequence(plan):
    """Each lane walks its own contiguous run and strays from it by less than a window."""
    order = [place for t in range(plan.steps_per_epoch) for place in plan.samples_of(t).samples]
    shards, ends = plan._shard_order(0)
    starts = dict(zip(shards.tolist(), [0, *ends.tolist()[:-1]], strict=True))
    places = [starts[shard] + row for shard, row in order]
    for lane in range(min(plan.lanes, plan.samples)):
        run = places[lane :: plan.lanes]
        assert sorted(run) == list(range(min(run), max(run) + 1))
        assert all(abs(p - min(run) - i) < plan.window for i, p in enumerate(run))


def test_epochs_and_seeds_differ():
    """Another epoch or another seed gives another order of the same samples."""
    orders = set()
    for seed in (0, 1):
        plan = Plan(shard_samples=(30, 30, 30), seed=seed, global_batch=90)
        orders |= {plan.samples_of(step).samples for step in range(3)}
    assert len(orders) == 6
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_order_is_pinned():
    """The order never changes between versions: interrupted runs must be able to go on."""
    plan = Plan(shard_samples=(3, 4, 2), seed=7, global_batch=3, lanes=3, window=2)
    assert [plan.samples_of(step).samples for step in (0, 1, 5)] == [
        ((1, 0), (1, 3), (0, 1)),
        ((1, 1), (2, 0), (0, 0)),
        ((0, 0), (1, 0), (1, 3)),
    ]


def test_impossible_worlds_are_refused_with_the_possible_ones():
    """A world that does not divide the lanes, or is larger than a batch, is refused."""
    with pytest.raises(ValueError, match=r"5 ranks .* 48 lanes .* 32; .*: 1, 2, 3, .*, 24$"):
        check_world(5, 48, 32)
    with pytest.raises(ValueError, match=r"48 ranks .*: 1, 2, 3, 4, 6, 8, 12, 16, 24$"):
        check_world(48, 48, 32)
    check_world(12, 48, 32)
    with pytest.raises(ValueError, match=r"possible: 1, 2, 3, 4$"):
        Plan(shard_samples=(9,), seed=0, global_batch=4).samples_of(0, 0, 6)
    with pytest.raises(ValueError, match="0 ranks"):
        check_world(0, 48, 32)
    assert [n for n in range(1, 49) if _allowed(n)] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]


def _allowed(world):
    try:
        check_world(world, 48, 48)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shard_samples": ()}, "no samples"),
        ({"shard_samples": (0, 0)}, "no samples"),
        ({"shard_samples": (3, -1)}, "no samples"),
        ({"seed": -1}, "seed must be >= 0, not -1"),
        ({"global_batch": 0}, "global_batch must be >= 1"),
        ({"lanes": 0}, "lanes must be >= 1"),
        ({"window": 0}, "window must be >= 1"),
    ],
)
def test_impossible_plans_are_refused(change, text):
    """A plan without samples or with a size below one says what is wrong."""
    with pytest.raises(ValueError, match=text):
        Plan(**({"shard_samples": (3,), "seed": 0, "global_batch": 1} | change))


def test_impossible_ranks_and_steps_are_refused():
    """A rank outside the world and a negative step are refused."""
    plan = Plan(shard_samples=(9,), seed=0, global_batch=4)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, not 2"):
        plan.samples_of(0, 2, 2)
    with pytest.raises(ValueError, match="step must be >= 0"):
        plan.samples_of(-1)


def test_captions_are_pinned():
    """The choice among captions never changes between versions."""
    chosen = [caption_index(7, epoch, f"key-{n}", 5) for n in range(3) for epoch in (0, 1, 4, 7)]
    assert chosen == [1, 3, 0, 4, 4, 1, 2, 2, 1, 3, 0, 1]


@given(st.integers(0, 2**40), st.text(max_size=20), st.integers(1, 200), st.integers(0, 5))
def test_captions_take_turns(seed, key, count, turn):
    """Over `count` aligned epochs each caption of a sample is used exactly once."""
    epochs = range(turn * count, (turn + 1) * count)
    used = [caption_index(seed, epoch, key, count) for epoch in epochs]
    assert sorted(used) == list(range(count))


def test_captions_of_different_samples_are_independent():
    """In one epoch the samples do not all use the caption of the same number."""
    used = Counter(caption_index(0, 0, f"key-{n}", 5) for n in range(1000))
    assert set(used) == set(range(5))
    assert max(used.values()) < 300


def test_a_sample_without_captions_is_refused():
    """Choosing among no captions is an error."""
    with pytest.raises(ValueError, match="at least one caption"):
        caption_index(0, 0, "key", 0)

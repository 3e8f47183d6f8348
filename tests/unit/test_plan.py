from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdn.data.plan import Plan, caption_index, check_world


@st.composite
def plans(draw):
    """Plans over uneven shards, with the world sizes that they allow."""
    lanes = draw(st.sampled_from([1, 2, 4, 6, 12, 48]))
    plan = Plan(
        shard_samples=(*draw(st.lists(st.integers(0, 23), min_size=1, max_size=8)), 1),
        seed=draw(st.integers(0, 2**40)),
        global_batch=draw(st.integers(1, 4)) * draw(st.sampled_from([1, 2, 3, 4, 12])),
        lanes=lanes,
        window=draw(st.integers(1, 9)),
    )
    fits = [n for n in range(1, lanes + 1) if lanes % n == 0 and plan.global_batch % n == 0]
    return plan, fits


def interleaved(parts):
    """The global batch of the ranks' shares: rank r holds its positions r, r + world, ..."""
    longest = max(len(part.samples) for part in parts)
    return [p.samples[i] for i in range(longest) for p in parts if i < len(p.samples)]


@settings(max_examples=300, deadline=None)
@given(plans(), st.integers(0, 3))
def test_every_world_size_reads_the_same_global_batches(case, epoch):
    """The ranks' shares put together are the same batch, in the same order, for any world size."""
    plan, worlds = case
    for t in range(plan.steps_per_epoch):
        step = epoch * plan.steps_per_epoch + t
        alone = plan.samples_of(step)
        for world in worlds:
            parts = [plan.samples_of(step, rank, world) for rank in range(world)]
            assert interleaved(parts) == list(alone.samples)
            assert {part.epoch for part in parts} == {epoch}


@settings(max_examples=300, deadline=None)
@given(plans(), st.integers(0, 3), st.data())
def test_every_sample_comes_exactly_once_an_epoch(case, epoch, data):
    """Over all ranks and steps of any epoch each (shard, row) is read once, fillers not counted."""
    plan, worlds = case
    world = data.draw(st.sampled_from(worlds))
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    read = Counter(
        place
        for step in steps
        for rank in range(world)
        for place in plan.samples_of(step, rank, world).samples
    )
    expected = {(s, row) for s, rows in enumerate(plan.shard_samples) for row in range(rows)}
    assert set(read) == expected
    assert set(read.values()) == {1}


@settings(max_examples=300, deadline=None)
@given(plans(), st.integers(1, 3), st.data())
def test_resuming_is_arithmetic(case, epoch, data):
    """A plan made anew and asked only from a step in epoch 1 to 3 on gives what the first gave."""
    plan, worlds = case
    first = (epoch * plan.steps_per_epoch) + data.draw(st.integers(0, plan.steps_per_epoch - 1))
    last = first + plan.steps_per_epoch + 1
    whole = [plan.samples_of(step) for step in range(last)][first:]
    again = Plan(
        shard_samples=plan.shard_samples,
        seed=plan.seed,
        global_batch=plan.global_batch,
        lanes=plan.lanes,
        window=plan.window,
    )
    world = data.draw(st.sampled_from(worlds))
    for step, part in zip(range(last - 1, first - 1, -1), reversed(whole), strict=True):
        parts = [again.samples_of(step, rank, world) for rank in range(world)]
        assert interleaved(parts) == list(part.samples)


@settings(max_examples=300, deadline=None)
@given(plans(), st.data())
def test_weights_give_the_mean_over_the_global_batch(case, data):
    """Weights sum to the world size, and a rank without samples has weight 0 and a filler."""
    plan, worlds = case
    world = data.draw(st.sampled_from(worlds))
    for step in range(plan.steps_per_epoch):
        parts = [plan.samples_of(step, rank, world) for rank in range(world)]
        total = sum(len(part.samples) for part in parts)
        assert sum(part.weight for part in parts) == pytest.approx(world)
        for part in parts:
            assert part.weight == pytest.approx(len(part.samples) * world / total)
            assert (part.filler is not None) == (part.samples == ())
        if total == plan.global_batch:
            assert {part.weight for part in parts} == {1.0}


@settings(max_examples=100, deadline=None)
@given(plans())
def test_lanes_are_read_in_sequence(case):
    """Each lane walks its own contiguous run and strays from it by less than a window."""
    plan, _ = case
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
    """A world size that does not divide lanes and batch is refused, naming those that do."""
    with pytest.raises(ValueError, match=r"5 ranks .* 48 lanes .* 32 .*: 1, 2, 4, 8, 16$"):
        check_world(5, 48, 32)
    with pytest.raises(ValueError, match=r"possible: 1, 2, 4$"):
        Plan(shard_samples=(9,), seed=0, global_batch=4).samples_of(0, 0, 3)
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

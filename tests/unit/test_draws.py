"""Which captions an evaluation draws, under each protocol."""

from __future__ import annotations

import itertools

import pytest
import tiny_data

from sdn.config import EvaluationConfig
from sdn.data.dataset import open_dataset
from sdn.data.loader import load_split
from sdn.draws import GAN_DRAWS, Draws, plan_draws

PROTOCOLS = ("each-image", "authors", "gan")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """12 test images with one to three captions each."""
    folder = tmp_path_factory.mktemp("data")
    records = [tiny_data.record(n) for n in range(3)]
    for n in range(3, 15):
        captions = tuple(f"picture {n}, caption {k}" for k in range(1 + n % 3))
        records.append(tiny_data.record(n, "test", captions=captions))
    tiny_data.write(folder, records)
    return open_dataset(folder)


@pytest.fixture(scope="module")
def split(dataset):
    return load_split(dataset, "test")


def drawn(dataset, protocol, captions=None, seed=0):
    return plan_draws(dataset, EvaluationConfig(protocol=protocol, captions=captions, seed=seed))


def pairs(draws):
    return list(zip(draws.truth, draws.captions, strict=True))


def every(split):
    return [(row, text) for row, found in enumerate(split.captions) for text in found]


def test_each_image_is_drawn_by_its_first_caption(dataset, split):
    """One draw an image, in the order of the split; a limit takes the first."""
    found = drawn(dataset, "each-image")
    assert pairs(found) == [(row, captions[0]) for row, captions in enumerate(split.captions)]
    assert pairs(drawn(dataset, "each-image", 5)) == pairs(found)[:5]
    assert pairs(drawn(dataset, "each-image", 99)) == pairs(found)


def test_authors_draw_every_caption_once(dataset, split):
    """Every caption once; a limit takes so many at random, without repetition."""
    assert pairs(drawn(dataset, "authors")) == every(split)
    assert pairs(drawn(dataset, "authors", 24)) == every(split)
    few = pairs(drawn(dataset, "authors", 9))
    assert len(set(few)) == 9
    assert set(few) < set(every(split))
    assert few != every(split)[:9]


def test_gans_draw_30000_or_all(dataset, split):
    """30,000 of the captions; each once where there are fewer; a limit takes fewer still."""
    assert GAN_DRAWS == 30_000
    assert sorted(pairs(drawn(dataset, "gan"))) == sorted(every(split))
    assert len(set(pairs(drawn(dataset, "gan", 7)))) == 7


def test_independent_draws_are_of_different_images(dataset):
    """The first draw of each true image, in their order."""
    found = drawn(dataset, "authors")
    rows = [found.truth[number] for number in found.independent()]
    assert rows == sorted(set(found.truth))
    assert found.independent()[0] == 0


@pytest.mark.parametrize(
    ("protocol", "captions"), list(itertools.product(PROTOCOLS, (None, 4, 10)))
)
def test_truth_rises_and_owns_the_caption(dataset, split, protocol, captions):
    """Draws lie in the order of the split, and each true image has the caption drawn for it."""
    found = drawn(dataset, protocol, captions)
    assert list(found.truth) == sorted(found.truth)
    assert all(text in split.captions[row] for row, text in pairs(found))
    assert found.keys == split.keys
    assert found.labels == split.labels
    assert found.seed == 0


@pytest.mark.parametrize("protocol", ["authors", "gan"])
def test_the_seed_decides(dataset, protocol):
    """The same seed draws the same, another one others."""
    one, same, other = (drawn(dataset, protocol, 8, seed) for seed in (3, 3, 4))
    assert one == same
    assert one.captions != other.captions
    assert (one.seed, other.seed) == (3, 4)


def test_spread():
    """Numbers are spread evenly over all draws, at most as many as there are."""
    draws = Draws(captions=("x",) * 10, truth=tuple(range(10)), keys=(), labels=(), seed=0)
    assert draws.spread(5) == [0, 2, 4, 6, 8]
    assert draws.spread(3) == [0, 3, 6]
    assert draws.spread(99) == list(range(10))
    assert len(draws) == 10


def test_no_test_split_is_refused(tmp_path):
    """Data without a test split names the setting to raise."""
    tiny_data.write(tmp_path, [tiny_data.record(n) for n in range(4)])
    with pytest.raises(ValueError, match=r"no test split .* raise data\.test_share"):
        drawn(open_dataset(tmp_path), "each-image")

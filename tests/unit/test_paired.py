"""Whether two models differ: against KIDs computed anew, and in many trials."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sdn.features.rows import HeldRows
from sdn.scores.kernel import kid
from sdn.scores.paired import FLIPS, _of_parts, paired_kid, paired_shares


def normal(n, dim=6, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator) + shift


def exact_kid(real, fake):
    """KID in float64, from whole matrices."""
    real, fake = real.double(), fake.double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(real), len(fake)
    own_real, own_fake = kernel(real, real), kernel(fake, fake)
    return float(
        (own_real.sum() - own_real.trace()) / (n * (n - 1))
        + (own_fake.sum() - own_fake.trace()) / (m * (m - 1))
        - 2 * kernel(real, fake).mean()
    )


def exact_parts(real, a, b):
    """d_i of the docstring, in float64."""
    real, a, b = real.double(), a.double(), b.double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(real)
    pairs = kernel(a, a) + kernel(a, b) - kernel(b, a) - kernel(b, b)
    pairs.fill_diagonal_(0)
    against = kernel(a, real).sum(1) - kernel(b, real).sum(1)
    return pairs.sum(1) / (n * (n - 1)) - 2 * against / (n * m)


def swapped(a, b, which):
    one, other = a.clone(), b.clone()
    one[which], other[which] = b[which], a[which]
    return one, other


@pytest.fixture
def parts(monkeypatch):
    """What each call of `paired_kid` found for each caption."""
    found = []

    def recording(values, n):
        found.append(values)
        return _of_parts(values, n)

    monkeypatch.setattr("sdn.scores.paired._of_parts", recording)
    return found


SETS = [(normal(50, seed=1), normal(40, seed=2), normal(40, seed=3, shift=s)) for s in (0.0, 0.4)]


@pytest.mark.parametrize(("real", "a", "b"), SETS)
def test_gain_is_the_difference_of_two_kids(real, a, b):
    """The gain is KID(champion) - KID(challenger), and turns its sign with the two."""
    found = paired_kid(HeldRows(real), HeldRows(a), HeldRows(b))
    expected = kid(HeldRows(real), HeldRows(a)).value - kid(HeldRows(real), HeldRows(b)).value
    assert found.gain.value == pytest.approx(expected, abs=1e-6)
    assert found.gain.value == pytest.approx(exact_kid(real, a) - exact_kid(real, b), abs=1e-6)
    back = paired_kid(HeldRows(real), HeldRows(b), HeldRows(a))
    assert back.gain.value == pytest.approx(-found.gain.value, abs=1e-6)
    assert found.gain.count == 40
    assert (found.gain.high - found.gain.low) / 2 == pytest.approx(1.959964 * found.error)


@pytest.mark.parametrize(("real", "a", "b"), SETS)
def test_swapping_captions_turns_their_signs(real, a, b, parts):
    """Any captions' images swapped by hand change the gain as the linear form says, to 1e-9."""
    paired_kid(HeldRows(real), HeldRows(a), HeldRows(b))
    exact = exact_parts(real, a, b)
    torch.testing.assert_close(parts[0], exact, rtol=0, atol=1e-7)  # kernels are float32
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        which = torch.rand(40, generator=generator) < 0.5
        one, other = swapped(a, b, which)
        gain = exact_kid(real, one) - exact_kid(real, other)
        signs = 1 - 2 * which.double()
        assert float(signs @ exact) == pytest.approx(gain, abs=1e-9)
        found = paired_kid(HeldRows(real), HeldRows(one), HeldRows(other)).gain.value
        assert found == pytest.approx(float(signs @ parts[0]), abs=1e-6)


@pytest.mark.parametrize(
    "parts",
    # 0.1 + 0.2 - 0.3 is as much as its opposite, but for rounding.
    [[0.5, -0.2, 0.9, 0.4, 0.1, 0.3, -0.1, 0.7], [0.1, 0.2, -0.3], [-0.1, -0.2, 0.3]],
)
def test_p_value_is_the_share_of_all_swaps(parts):
    """Of few captions the p-value is near the share over all swaps, counted one by one."""
    n, gain = len(parts), sum(parts)
    every = [
        sum(s * v for s, v in zip(signs, parts, strict=True)) >= gain - 1e-9
        for signs in itertools.product((1, -1), repeat=n)
    ]
    expected = sum(every) / 2**n
    error = (expected * (1 - expected) / FLIPS) ** 0.5
    for scale in (1, 1e-9, 1e9, 1e9 / 3, 1e9 / 7):  # ties are ties in any unit
        values = scale * torch.tensor(parts, dtype=torch.float64)
        assert abs(_of_parts(values, n).p_value - expected) < 4 * error


def test_no_trial_of_equal_models_more_often_than_the_level():
    """A/A: of 400 pairs of equally good models at most 5% have p below 0.025, and half below 1/2.

    Both ways round: neither place is favoured.
    """
    real = HeldRows(normal(60, 4, seed=1))
    below, half = [0, 0], [0, 0]
    for trial in range(200):
        a, b = normal(24, 4, seed=5000 + trial), normal(24, 4, seed=9000 + trial)
        for way, (one, other) in enumerate(((a, b), (b, a))):
            p = paired_kid(real, HeldRows(one), HeldRows(other)).p_value
            below[way] += p < 0.025
            half[way] += p < 0.5
    assert sum(below) <= 0.05 * 400
    assert sum(below) >= 1
    for found in half:
        assert 75 <= found <= 125


def test_a_planted_change_is_found():
    """A challenger nearer to the real images is found; one further away is not."""
    real, a, b = normal(80, seed=1), normal(80, seed=2, shift=0.5), normal(80, seed=3, shift=0.2)
    better = paired_kid(HeldRows(real), HeldRows(a), HeldRows(b))
    assert better.gain.low > 0
    assert better.p_value < 0.001
    assert better.needed < 80
    worse = paired_kid(HeldRows(real), HeldRows(b), HeldRows(a))
    assert worse.p_value > 0.999
    assert worse.needed is None


def test_equal_images_are_no_gain():
    """The same images twice: gain 0, p 1, and no number of captions would show one."""
    rows = HeldRows(normal(30, seed=2))
    found = paired_kid(HeldRows(normal(40, seed=1)), rows, rows)
    assert found.gain.value == found.error == 0
    assert found.p_value == 1
    assert found.needed is None


def test_p_is_never_nought():
    """What no swap reaches has the least p that so many swaps can show."""
    assert paired_shares(torch.zeros(500), torch.ones(500)).p_value == 1 / (FLIPS + 1)


def test_same_call_same_answer():
    """The swaps are drawn by a seed of their own, which is no business of the caller's."""
    sets = [HeldRows(normal(30, seed=n)) for n in range(3)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert paired_kid(*sets) == paired_kid(*sets)
    assert torch.equal(torch.get_rng_state(), state)


def test_needed_captions_are_those_of_80_percent():
    """So many captions as are named find the gain in about 80% of the trials, at p below 0.025."""
    generator = torch.Generator().manual_seed(0)
    pilot = 0.25 + torch.randn(1000, generator=generator)
    needed = paired_shares(torch.zeros(1000), pilot).needed
    assert needed == pytest.approx((2.8016 / 0.25) ** 2, rel=0.4)
    true = float(pilot.mean())
    found = 0
    for _ in range(60):
        rows = true + torch.randn(needed, generator=generator)
        found += paired_shares(torch.zeros(needed), rows).p_value < 0.025
    assert 0.6 < found / 60 < 0.95


def test_shares_are_paired_by_caption():
    """The gain in a share is the mean difference, with the error of differences."""
    champion = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0])
    challenger = torch.tensor([1.0, 1, 0, 1, 1, 0, 1, 0])
    found = paired_shares(champion, challenger)
    difference = challenger - champion
    assert found.gain.value == pytest.approx(0.25)
    assert found.error == pytest.approx(float(difference.std()) / math.sqrt(8))
    assert found.gain.count == 8


def test_blocks_of_any_size_give_the_same(monkeypatch):
    """How many rows are read at a time changes nothing."""
    sets = [HeldRows(normal(n, seed=s)) for s, n in enumerate((50, 40, 40))]
    whole = paired_kid(*sets)
    monkeypatch.setattr(HeldRows.blocks, "__defaults__", (7,))
    parted = paired_kid(*sets)
    assert parted.gain.value == pytest.approx(whole.gain.value, abs=1e-7)
    assert parted.error == pytest.approx(whole.error, rel=1e-5)


def test_only_the_same_captions_are_compared(monkeypatch):
    """Sets of other length, or of fewer than 3, are refused with their sizes; `MOST` are read."""
    real = HeldRows(normal(20))
    with pytest.raises(ValueError, match="not 10 and 9 images beside 20 of the reference"):
        paired_kid(real, HeldRows(normal(10)), HeldRows(normal(9)))
    with pytest.raises(ValueError, match="at least 3 images, not 2 and 2"):
        paired_kid(real, HeldRows(normal(2)), HeldRows(normal(2)))
    with pytest.raises(ValueError, match="beside 2 of the reference"):
        paired_kid(HeldRows(normal(2)), HeldRows(normal(9)), HeldRows(normal(9)))
    monkeypatch.setattr("sdn.scores.paired.MOST", 8)
    a, b = normal(10, seed=1), normal(10, seed=2)

    def spread(n):
        return [i * n // 8 for i in range(8)]

    cut = paired_kid(HeldRows(normal(8)), HeldRows(a[spread(10)]), HeldRows(b[spread(10)]))
    assert paired_kid(HeldRows(normal(20)[:20]), HeldRows(a), HeldRows(b)).gain.count == 8
    assert paired_kid(HeldRows(normal(8)), HeldRows(a), HeldRows(b)) == cut

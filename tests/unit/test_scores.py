"""Scores against slow references that are written down from their definitions."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import binomtest
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore as TorchmetricsScore
from torchmetrics.image.kid import KernelInceptionDistance

from sdn.features.rows import HeldRows, RowWriter
from sdn.scores import inception
from sdn.scores.diversity import apart, caption_diversity, diversity
from sdn.scores.frechet import fid, moments
from sdn.scores.inception import InceptionScore
from sdn.scores.kernel import kid
from sdn.scores.manifold import precision_recall
from sdn.scores.matching import found_captions, mismatched, r_precision
from sdn.scores.retrieval import retrieval_scores, true_image_ranks
from sdn.scores.score import Score, of_share, wilson
from sdn.scores.sets import score_sets


def normal(n, dim=6, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator) * scale + shift


def held(*arguments, **changes):
    return HeldRows(normal(*arguments, **changes))


def on_disk(path, tensor):
    with RowWriter(path) as writer:
        writer.write(tensor)
    return writer.rows()


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")


class Taken(torch.nn.Module):
    """Stands in torchmetrics for the network: what comes are the features themselves."""

    num_features = 6

    def forward(self, rows):
        return rows


# Score


def test_what_is_empty_is_left_out_of_the_json():
    """A withheld score tells its reason and count; a value of 0 is not left out."""
    assert Score(count=3, withheld="why").as_dict() == {"count": 3, "withheld": "why"}
    assert of_share(0.0, 5).as_dict()["value"] == 0.0
    assert of_share(0.0, 5).as_dict()["low"] == 0.0


@pytest.mark.parametrize("count", [1, 2, 10, 97, 5000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_wilson_is_scipys(share, count):
    """The interval equals scipy's Wilson interval at 95%."""
    hits = round(share * count)
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    low, high = wilson(hits / count, count)
    assert low == pytest.approx(expected.low, abs=1e-6)
    assert high == pytest.approx(expected.high, abs=1e-6)
    assert 0 <= low <= hits / count + 1e-12
    assert hits / count - 1e-12 <= high <= 1


# FID


def numpy_fid(real, fake):
    a, b = real.double().numpy(), fake.double().numpy()
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = a.mean(0) - b.mean(0)
    return gap @ gap + np.trace(c + d - 2 * sqrtm(c @ d).real)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 1.0), (0.0, 2.0), (3.0, 0.3)])
def test_fid_is_the_formula(shift, scale):
    """FID equals scipy's matrix root of the same features, and torchmetrics' own class."""
    real, fake = normal(90, seed=1), normal(70, seed=2, shift=shift, scale=scale)
    found = fid(HeldRows(real), HeldRows(fake))
    assert found.value == pytest.approx(numpy_fid(real, fake), rel=1e-3)
    theirs = FrechetInceptionDistance(Taken(), input_img_size=(6,)).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert found.value == pytest.approx(float(theirs.compute()), rel=1e-3)
    assert math.isfinite(found.low)
    assert found.low < found.value < found.high
    assert found.count == 70


def test_fid_interval_narrows_with_more_images():
    """Four times the images give about half the interval."""
    widths = []
    for n in (400, 1600):
        found = fid(held(n, seed=1), held(n, seed=2, shift=0.5))
        widths.append(found.high - found.low)
    assert 0.25 < widths[1] / widths[0] < 0.9


def test_fid_is_withheld_where_it_would_tell_the_number_of_images():
    """Below twice as many images as numbers in a vector, of either set, there is only a reason."""
    assert fid(held(12), held(12, seed=1)).value is not None
    for real, fake in ((12, 11), (11, 12)):
        found = fid(held(real), held(fake, seed=1))
        assert found.value is found.low is found.high is None
        assert "at least 12 images a set, twice the 6 numbers" in found.withheld
        assert f"{real} real and {fake} others" in found.withheld


def test_fid_jackknife_is_the_one_of_groups_left_out():
    """The interval is that of FIDs computed anew without each tenth of both sets."""
    real, fake = normal(80, seed=1), normal(60, seed=2, shift=1.0)
    values = []
    for group in range(10):
        fewer_real = torch.cat([real[: 8 * group], real[8 * group + 8 :]])
        fewer_fake = torch.cat([fake[: 6 * group], fake[6 * group + 6 :]])
        values.append(numpy_fid(fewer_real, fewer_fake))
    variance = 9 * np.var(values)
    found = fid(HeldRows(real), HeldRows(fake))
    assert (found.high - found.value) / 1.959964 == pytest.approx(variance**0.5, rel=1e-3)


def test_a_distance_has_no_interval_below_zero():
    """FID and diversity end at 0; KID is unbiased, and its interval holds negative values."""
    alike = [(held(16, seed=2 * n), held(16, seed=2 * n + 1)) for n in range(10)]
    assert min(fid(*pair).low for pair in alike) == 0
    assert min(kid(*pair).low for pair in alike) < 0
    assert diversity(held(4)).low >= 0


def test_moments_add_up():
    """The moments of a set are the sums of its parts'."""
    rows = held(3000)
    parts = [moments(rows.part(0, 1100)), moments(rows.part(1100, 3000))]
    for whole, one, other in zip(moments(rows), *parts, strict=True):
        torch.testing.assert_close(torch.as_tensor(whole), torch.as_tensor(one + other))


# KID


def numpy_kid(a, b):
    """Unbiased squared MMD with the kernel (<a, b> / F + 1)^3, pair by pair."""
    a, b = a.double().numpy(), b.double().numpy()
    n, m, width = len(a), len(b), a.shape[1]

    def kernel(x, y):
        return (np.dot(x, y) / width + 1) ** 3

    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j)
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j)
    across = sum(kernel(x, y) for x in a for y in b)
    return within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * across / (n * m)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_kid_is_the_formula(shift):
    """KID over sets of different size is the double sum over pairs."""
    real, fake = normal(40, seed=1), normal(30, seed=2, shift=shift)
    found = kid(HeldRows(real), HeldRows(fake))
    assert found.value == pytest.approx(numpy_kid(real, fake), rel=1e-3, abs=1e-6)
    assert found.low < found.value < found.high
    assert found.count == 30


def test_kid_is_torchmetrics_with_one_subset_of_all():
    """torchmetrics' class with a subset as large as the sets gives the same."""
    real, fake = normal(50, seed=1), normal(50, seed=2, shift=0.5)
    theirs = KernelInceptionDistance(Taken(), subsets=1, subset_size=50)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    found = kid(HeldRows(real), HeldRows(fake))
    assert found.value == pytest.approx(float(theirs.compute()[0]), rel=1e-3)


def test_kid_jackknife_is_the_one_of_sets_with_an_image_left_out():
    """The interval is that of KIDs computed anew without each image."""
    real, fake = normal(12, seed=1), normal(9, seed=2, shift=0.5)
    variance = 0.0
    for left, rows in ((0, real), (1, fake)):
        values = []
        for i in range(len(rows)):
            fewer = torch.cat([rows[:i], rows[i + 1 :]])
            values.append(numpy_kid(*((fewer, fake) if left == 0 else (real, fewer))))
        variance += (len(rows) - 1) * np.var(values)
    found = kid(HeldRows(real), HeldRows(fake))
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * variance**0.5, rel=1e-3)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_kid_interval_covers_the_truth(shift):
    """Of 200 trials the 95% interval covers the truth in 85% to 99.5%; without bias."""
    truth = 0.0
    if shift:  # the kernel distance of two large sets
        truth = kid(held(9000, 4, seed=1), held(9000, 4, 2, shift)).value
    values, covered = [], 0
    for trial in range(200):
        found = kid(
            held(60, 4, seed=1000 + 2 * trial), held(60, 4, seed=1001 + 2 * trial, shift=shift)
        )
        values.append(found.value)
        covered += found.low <= truth <= found.high
    assert 0.85 <= covered / 200 <= 0.995
    error = statistics.stdev(values) / 200**0.5
    assert abs(statistics.mean(values) - truth) < 4 * error


def test_kid_is_withheld_for_two_images():
    """Without three images a set there is no jackknife, and the score says so."""
    found = kid(held(2), held(5))
    assert found.value is None
    assert "at least 3 images a set, not 2 and 5" in found.withheld


def test_kid_takes_so_many_spread_evenly(monkeypatch):
    """Of more rows than `MOST` so many are taken, from the whole set."""
    monkeypatch.setattr("sdn.scores.kernel.MOST", 20)
    real, fake = normal(50, seed=1), normal(40, seed=2)
    assert kid(HeldRows(real), HeldRows(fake)) == kid(
        HeldRows(real[[i * 50 // 20 for i in range(20)]]), HeldRows(fake[::2])
    )


# Inception Score


def logits(n, classes=7, seed=0):
    return 2 * normal(n, classes, seed)


def streamed(rows, cuts, splits=10):
    score = InceptionScore(len(rows), rows.shape[1], splits)
    for block in rows.split(cuts):
        score.update(block)
    return score


@pytest.mark.parametrize("splits", [2, 10])
def test_inception_score_is_torchmetrics_in_each_split(splits, monkeypatch):
    """In the order as it comes, mean and deviation over the splits are torchmetrics'."""
    rows = logits(600)
    theirs = TorchmetricsScore(Taken(), splits=splits)
    theirs.features.append(rows.double())
    monkeypatch.setattr(torch, "randperm", torch.arange)
    mean, deviation = theirs.compute()
    found = streamed(rows, 64, splits).of_splits()
    assert len(found) == splits
    assert float(found.mean()) == pytest.approx(float(mean), rel=1e-6)
    assert float(found.std()) == pytest.approx(float(deviation), rel=1e-5)
    one = TorchmetricsScore(Taken(), splits=1)
    one.features.append(rows[: 600 // splits].double())
    assert float(found[0]) == pytest.approx(float(one.compute()[0]), rel=1e-6)


@pytest.mark.parametrize("n", [600, 607])
def test_inception_score_does_not_depend_on_the_cuts(n):
    """However the stream is cut into blocks, the same comes out, also with uneven splits."""
    rows = logits(n)
    whole = streamed(rows, n).of_splits()
    for cuts in (1, 7, 64, 599, [100, 3, n - 103]):
        torch.testing.assert_close(streamed(rows, cuts).of_splits(), whole)
    assert int(streamed(rows, 64)._counts.sum()) == n
    assert streamed(rows, 64)._counts.min() == n // 10


def test_inception_score_bounds():
    """Images all alike score 1; sure ones spread over all K classes score K."""
    alike = torch.zeros(100, 5)
    sure = 1e3 * torch.eye(5).repeat(20, 1)
    torch.testing.assert_close(streamed(alike, 9).of_splits(), torch.ones(10).double())
    torch.testing.assert_close(streamed(sure, 9).of_splits(), torch.full((10,), 5.0).double())


def test_inception_score_is_withheld(monkeypatch):
    """Below 5,000 images, and from a network without classes, there is only a reason."""
    assert inception.LEAST == 5000
    few = streamed(logits(4999), 512).score()
    assert few.value is None
    assert few.withheld == "Inception Score needs at least 5,000 images, there are 4,999"
    enough = streamed(logits(5000), 512).score()
    assert enough.low < enough.value < enough.high
    assert 1 <= enough.value <= 7
    assert "t over 10 splits" in enough.interval
    none = InceptionScore(5000, 0)
    none.update(torch.zeros(64, 0))
    assert none.score().withheld == "the feature network has no classes"


def test_inception_interval_is_students():
    """The half width is Student's quantile times the deviation over the root of the splits."""
    score = streamed(logits(5000), 512)
    found = score.score()
    deviation = float(score.of_splits().std())
    assert (found.high - found.low) / 2 == pytest.approx(2.262157 * deviation / 10**0.5, rel=1e-6)


# Precision and recall


def slow_share(rows, manifold):
    """Share of rows within a ball about an image of the manifold to its third neighbour."""
    a, b = rows.double().numpy(), manifold.double().numpy()
    radii = []
    for i, x in enumerate(b):
        radii.append(sorted(np.linalg.norm(x - y) for j, y in enumerate(b) if j != i)[2])
    inside = [any(np.linalg.norm(x - y) <= r for y, r in zip(b, radii, strict=True)) for x in a]
    return sum(inside) / len(a)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (1.0, 1.0), (0.0, 0.3), (0.0, 3.0)])
def test_precision_and_recall_are_the_slow_reference(shift, scale):
    """Both shares equal those counted image by image, whichever set is the narrower."""
    real, fake = normal(60, 3, seed=1), normal(45, 3, seed=2, shift=shift, scale=scale)
    precision, recall = precision_recall(HeldRows(real), HeldRows(fake))
    assert precision.value == pytest.approx(slow_share(fake, real))
    assert recall.value == pytest.approx(slow_share(real, fake))
    assert (precision.count, recall.count) == (45, 60)
    assert precision.low <= precision.value <= precision.high


def test_precision_and_recall_tell_narrow_from_wide():
    """A narrow set is precise and recalls little, a wide one the other way round."""
    real = held(200, 3, seed=1)
    narrow = precision_recall(real, held(200, 3, seed=2, scale=0.1))
    wide = precision_recall(real, held(200, 3, seed=2, scale=5.0))
    assert narrow[0].value > 0.95
    assert narrow[1].value < 0.3
    assert wide[1].value > 0.95
    assert wide[0].value < 0.6


def test_copies_are_within_the_manifold():
    """A set against itself has precision and recall 1."""
    rows = held(80, 40, shift=5.0)
    assert [score.value for score in precision_recall(rows, rows)] == [1, 1]


def test_precision_needs_more_images_than_neighbours():
    """Three images have no third neighbour."""
    for one in precision_recall(held(3), held(9)):
        assert one.value is None
        assert "needs more than 3 images a set, not 3 and 9" in one.withheld


# Diversity


def test_diversity_is_the_mean_distance():
    """It grows with the spread, covers the mean over all pairs, and is 0 for one image alone."""
    rows = normal(400)
    every = torch.pdist(rows.double()).mean().item()
    found = diversity(HeldRows(rows))
    assert found.low <= every <= found.high
    assert diversity(HeldRows(3 * rows)).value == pytest.approx(3 * found.value, rel=1e-5)
    assert diversity(HeldRows(rows[:1].repeat(9, 1))).value == 0
    assert diversity(HeldRows(rows[:5])).value > 0
    assert "at least 4 images, not 3" in diversity(HeldRows(rows[:3])).withheld


def test_diversity_of_one_caption_is_the_mean_distance_of_its_two_images():
    """Row by row, over more rows than are read at a time."""
    one, other = normal(1100), normal(1100).flip(0)
    distances = apart(HeldRows(one), HeldRows(other))
    expected = (one.double() - other.double()).square().sum(1).sqrt()
    torch.testing.assert_close(distances, expected)
    found = caption_diversity(distances)
    assert found.value == pytest.approx(float(expected.mean()))
    assert found.low < found.value < found.high
    assert caption_diversity(torch.zeros(9)).value == 0
    assert "at least 2 captions, not 1" in caption_diversity(distances[:1]).withheld


def test_diversity_pairs_share_no_image():
    """Each image is in one pair: one far image counts in one of 500, whatever the seed."""
    rows = torch.zeros(1000, 2)
    rows[17, 0] = 1000.0
    for seed in range(3):
        assert diversity(HeldRows(rows), seed).value == pytest.approx(1000 / 500)


# Retrieval


def slow_rank(query, gallery, truth, groups):
    """1 + how many different images are strictly nearer than the true one."""
    distances = {}
    for row, image in enumerate(gallery):
        gap = math.sqrt(sum((a - b) ** 2 for a, b in zip(query, image, strict=True)))
        distances.setdefault(groups[row], gap)
    own = distances[groups[truth]]
    return 1 + sum(gap < own for gap in distances.values())


def case(seed, queries=25, images=40, copies=0):
    """Queries near their true images, in a gallery some of whose rows are copies of others."""
    generator = torch.Generator().manual_seed(seed)
    gallery = torch.randn(images, 3, generator=generator)
    for row in range(copies):
        gallery[images - 1 - row] = gallery[row % 5]
    truth = torch.randint(images, (queries,), generator=generator)
    found = gallery[truth] + 0.7 * torch.randn(queries, 3, generator=generator)
    rows = {}
    groups = [rows.setdefault(tuple(one), n) for n, one in enumerate(gallery.tolist())]
    return found, gallery, truth, groups


def ranked(queries, gallery, truth, groups):
    """Ranks, as an evaluation asks for them."""
    same = torch.tensor(groups)
    first = same == torch.arange(len(same))
    return true_image_ranks(HeldRows(queries), HeldRows(gallery), same[truth], first)


@pytest.mark.parametrize("copies", [0, 1, 15])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_the_slow_reference(seed, copies, monkeypatch):
    """Every rank equals the one counted image by image, in blocks of any size."""
    queries, gallery, truth, groups = case(seed, copies=copies)
    expected = [
        slow_rank(query, gallery.tolist(), true, groups)
        for query, true in zip(queries.tolist(), truth.tolist(), strict=True)
    ]
    assert max(expected) > 1
    assert ranked(queries, gallery, truth, groups).tolist() == expected
    monkeypatch.setattr("sdn.scores.retrieval._QUERIES", 7)
    monkeypatch.setattr(HeldRows.blocks, "__defaults__", (9,))
    assert ranked(queries, gallery, truth, groups).tolist() == expected


def test_retrieval_scores_are_counted():
    """Shares, mean inverse and median of the ranks, each within its interval."""
    ranks = torch.tensor([1, 1, 2, 3, 5, 6, 9, 40])
    found = retrieval_scores(ranks)
    assert found["top1_score"].value == 0.25
    assert found["top5_score"].value == 0.625
    assert found["median_rank"].value == 4
    expected = statistics.mean(1 / r for r in ranks.tolist())
    assert found["reciprocal_rank_score"].value == pytest.approx(expected)
    for score in found.values():
        assert score.low <= score.value <= score.high
        assert score.count == 8
        assert all(math.isfinite(x) for x in (score.low, score.high))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_retrieval_of_few_queries_is_finite(n):
    """One caption alone gives plain numbers."""
    for score in retrieval_scores(torch.arange(1, n + 1)).values():
        assert all(math.isfinite(x) for x in (score.value, score.low, score.high))


def test_identical_images_count_as_one():
    """Copies of a nearer image worsen the rank once, and a copy of the true one not at all."""
    gallery = torch.tensor([[0.0], [1.0], [1.0], [1.0], [3.0], [3.0]])
    query, groups = torch.tensor([[1.1]]), [0, 1, 1, 1, 4, 4]
    assert ranked(query, gallery, torch.tensor([5]), groups).item() == 3
    assert ranked(query, gallery, torch.tensor([5]), list(range(6))).item() == 5
    for true in (1, 2, 3):
        assert ranked(query, gallery, torch.tensor([true]), groups).item() == 1


def test_exact_hits_are_first():
    """The true images themselves as queries are all first, in many dimensions and among copies."""
    gallery = normal(300, 200, shift=10.0)
    gallery[250:] = gallery[:50]
    groups = [*range(250), *range(50)]
    truth = torch.arange(300)
    assert ranked(gallery, gallery, truth, groups).tolist() == [1] * 300


def test_retrieval_without_queries_is_refused():
    """No queries give no score but an error that says so."""
    with pytest.raises(ValueError, match="at least one query"):
        ranked(torch.zeros(0, 3), torch.zeros(5, 3), torch.zeros(0, dtype=torch.int64), [0] * 5)


# Caption match


def texts(n):
    return [f"caption number {i}" for i in range(n)]


def test_mismatched_never_say_the_same():
    """99 different ones each, none the own text however written; the seed alone decides."""
    captions = [*texts(60), *(t.upper() + "!" for t in texts(60)), "Caption   number 3"]
    others = [*texts(105), *(t.upper() for t in texts(105))]
    chosen = mismatched(captions, others, seed=4)
    assert chosen.shape == (121, 99)
    for caption, row in zip(captions, chosen.tolist(), strict=True):
        said = {" ".join(others[i].lower().split()) for i in row}
        assert len(said) == 99
        assert " ".join(caption.lower().split()).rstrip("!") not in said
    assert torch.equal(chosen, mismatched(captions, others, seed=4))
    assert not torch.equal(chosen, mismatched(captions, others, seed=5))


def test_mismatched_are_of_other_images():
    """Where an image has several captions, none of its others is held against the own one."""
    captions = texts(120)
    images = [i // 10 for i in range(120)]
    chosen = mismatched(captions, captions, images=images)
    for caption, row in enumerate(chosen.tolist()):
        assert len(set(row)) == 99
        assert all(images[i] != images[caption] for i in row)
    assert mismatched(texts(108), texts(108), images=[i // 10 for i in range(108)]) is None


def test_too_few_captions_give_none():
    """With 100 different texts there are 99 others; with 99, or 100 that differ in case, not."""
    assert mismatched(texts(5), texts(100)).shape == (5, 99)
    assert mismatched(texts(5), texts(99)) is None
    assert mismatched(texts(5), [*texts(99), "CAPTION number 0"]) is None


class Knowing:
    """A judge that reads the number in a caption; features are that number's unit vector."""

    def __init__(self, vectors):
        self.vectors = vectors

    def of_captions(self, captions):
        return self.vectors[[int(caption.split()[-1]) for caption in captions]]

    def of_features(self, features):
        return features


def test_a_knowing_judge_finds_all_and_a_random_one_a_hundredth():
    """R-precision is 1 for images that are what the caption says, 1% for any others."""
    captions = texts(3000)
    vectors = torch.nn.functional.normalize(normal(3000, 24), dim=1)
    chosen = mismatched(captions, captions)
    judge = Knowing(vectors)
    found = found_captions(judge, HeldRows(vectors), captions, captions, chosen)
    assert found.dtype == torch.float32
    assert r_precision(found).value == 1
    others = torch.nn.functional.normalize(normal(3000, 24, seed=1), dim=1)
    chance = r_precision(found_captions(judge, HeldRows(others), captions, captions, chosen))
    assert 0.004 < chance.value < 0.017
    assert chance.low < 0.01 < chance.high
    assert chance.count == 3000


def test_a_judge_that_cannot_tell_finds_nothing():
    """An own caption that only draws level with another is not found."""
    judge = Knowing(torch.ones(120, 4) / 2)
    captions = texts(120)
    found = found_captions(
        judge, HeldRows(torch.ones(120, 4) / 2), captions, captions, mismatched(captions, captions)
    )
    assert found.sum() == 0


# All together


def test_any_size_of_block_gives_the_same(monkeypatch):
    """Scores do not depend on how many rows are read at a time."""
    real, fake = held(70, 5, seed=1), held(50, 5, seed=2, shift=0.3)
    found = score_sets(real, fake)
    assert set(found) == {
        "kid_error",
        "fid_error",
        "precision_score",
        "recall_score",
        "diversity_score",
    }
    for size in (1, 7, 64):
        monkeypatch.setattr(HeldRows.blocks, "__defaults__", (size,))
        monkeypatch.setattr("sdn.scores.manifold._BLOCK", size)
        for name, score in score_sets(real, fake).items():
            for key in ("value", "low", "high"):
                assert score[key] == pytest.approx(found[name][key], rel=1e-4, abs=1e-7), name


def test_a_file_and_memory_give_the_same(tmp_path):
    """Rows on disk score as those in memory do."""
    real, fake = normal(70, seed=1), normal(50, seed=2)
    files = on_disk(tmp_path / "real", real), on_disk(tmp_path / "fake", fake)
    assert score_sets(*files) == score_sets(HeldRows(real), HeldRows(fake))


MEASURED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from sdn.features.rows import RowWriter
from sdn.scores.frechet import fid
from sdn.scores.inception import InceptionScore
from sdn.scores.kernel import kid
folder = Path(sys.argv[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def rows(n):
    torch.manual_seed(0)
    score = InceptionScore(n, 64)
    with RowWriter(folder / str(n)) as writer:
        for start in range(0, n, 500):
            block = torch.randn(500, 64)
            writer.write(block)
            score.update(block)
    assert score.of_splits().mean() > 1
    return writer.rows()
few = rows(2000)
assert fid(few, few.part(0, 1000)).value is not None
before = peak()
many = rows(40000)
assert fid(many, few).value is not None
print(peak() - before)
assert kid(few, few.part(0, 1000)).value is not None
before = peak()
assert kid(many, few).value is not None
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Of twenty times the rows, 10 MiB, streams keep less than 8 MiB; pairs, 381 MiB, not 64."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    streams, pairs = map(float, run.stdout.split())
    assert streams < 8
    assert pairs < 64

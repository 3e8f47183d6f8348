"""Scores against slow references that are written down from their definitions."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from sdn.config import TeacherConfig
from sdn.metrics import (
    blurred,
    identity_groups,
    kernel_distance,
    pixel_features,
    probe_accuracy,
    retrieval,
    tap_features,
    wilson,
)
from sdn.teacher import empty_teacher


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
    numbers = {}
    groups = [numbers.setdefault(tuple(row), len(numbers)) for row in gallery.tolist()]
    return found, gallery, truth, groups


@pytest.mark.parametrize("copies", [0, 1, 15])
@pytest.mark.parametrize("seed", range(3))
def test_retrieval_is_the_slow_reference(seed, copies):
    """Every score equals the one counted query by query, with identical images counted as one."""
    queries, gallery, truth, groups = case(seed, copies=copies)
    ranks = [
        slow_rank(query, gallery.tolist(), true, groups)
        for query, true in zip(queries.tolist(), truth.tolist(), strict=True)
    ]
    assert max(ranks) > 1
    found = retrieval(queries, gallery, truth, torch.tensor(groups))
    assert found.top1_score == pytest.approx(sum(r == 1 for r in ranks) / 25)
    assert found.top5_score == pytest.approx(sum(r <= 5 for r in ranks) / 25)
    assert found.median_rank == statistics.median(ranks)
    assert found.reciprocal_rank_score == pytest.approx(statistics.mean(1 / r for r in ranks))
    interval = binomtest(sum(r == 1 for r in ranks), 25).proportion_ci(method="wilson")
    assert found.top1_low == pytest.approx(interval.low, abs=1e-4)
    assert found.top1_high == pytest.approx(interval.high, abs=1e-4)
    assert found.queries == 25


def test_identical_images_count_as_one():
    """Copies of a nearer image worsen the rank once, and a copy of the true one not at all."""
    gallery = torch.tensor([[0.0], [1.0], [1.0], [1.0], [3.0], [3.0]])
    groups = torch.tensor([0, 1, 1, 1, 2, 2])
    query, truth = torch.tensor([[1.1]]), torch.tensor([5])
    assert retrieval(query, gallery, truth, groups).median_rank == 3
    assert retrieval(query, gallery, truth).median_rank == 5
    for true in (1, 2, 3):
        assert retrieval(query, gallery, torch.tensor([true]), groups).top1_score == 1


def test_exact_hits_score_full_marks():
    """The true images themselves as queries are all first, among copies too."""
    _, gallery, truth, groups = case(0, copies=15)
    found = retrieval(gallery[truth], gallery, truth, torch.tensor(groups))
    assert found.top1_score == found.top5_score == found.reciprocal_rank_score == 1
    assert found.median_rank == 1
    assert found.top1_low < 1
    assert found.top1_high == pytest.approx(1)


def test_retrieval_without_queries_is_refused():
    """No queries give no score but an error that says so."""
    with pytest.raises(ValueError, match="at least one query"):
        retrieval(torch.zeros(0, 3), torch.zeros(5, 3), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("count", [1, 2, 10, 97, 5000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_wilson_is_scipys(share, count):
    """The interval equals scipy's Wilson interval at 95%."""
    hits = round(share * count)
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    low, high = wilson(hits / count, count)
    assert low == pytest.approx(expected.low, abs=1e-4)
    assert high == pytest.approx(expected.high, abs=1e-4)
    assert 0 <= low <= hits / count + 1e-12
    assert hits / count - 1e-12 <= high <= 1


def numpy_mmd(a, b):
    """Unbiased squared MMD with the kernel (<a, b> / F + 1)^3, pair by pair."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    width = a.shape[1]

    def kernel(x, y):
        return (np.dot(x, y) / width + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j)
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j)
    across = sum(kernel(x, y) for x in a for y in b)
    return within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * across / (n * m)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_kernel_distance_of_whole_sets_is_the_formula(shift):
    """With subsets as large as the sets every subset is the whole: the formula, without spread."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(20, 6, generator=generator)
    fake = torch.randn(20, 6, generator=generator) + shift
    mean, deviation = kernel_distance(real, fake, subsets=3, subset_size=20)
    assert mean == pytest.approx(numpy_mmd(real.numpy(), fake.numpy()), rel=1e-4, abs=1e-5)
    assert deviation == pytest.approx(0, abs=1e-4)


def test_kernel_distance_orders_sets():
    """Sets of one distribution are near 0; the further apart, the larger; the seed decides all."""
    generator = torch.Generator().manual_seed(1)
    real, same = torch.randn(2, 300, 6, generator=generator).unbind()
    settings = {"subsets": 20, "subset_size": 50}
    near, near_spread = kernel_distance(real, same, **settings)
    assert abs(near) < 0.1
    assert near_spread > 0
    far = [kernel_distance(real, same + shift, **settings)[0] for shift in (0.5, 1, 2)]
    assert near < far[0] < far[1] < far[2]
    assert kernel_distance(real, same, **settings) == (near, near_spread)
    assert kernel_distance(real, same, **settings, seed=1) != (near, near_spread)


def test_kernel_distance_takes_no_more_than_there_is():
    """A subset size above both sets uses as many of each as the smaller has."""
    generator = torch.Generator().manual_seed(1)
    real, fake = torch.randn(12, 4, generator=generator), torch.randn(7, 4, generator=generator)
    large = kernel_distance(real, fake, subsets=4, subset_size=1000)
    assert large == kernel_distance(real, fake, subsets=4, subset_size=7)
    assert math.isfinite(large[0])


@pytest.mark.parametrize("side", [1, 3, 5])
def test_blurred_is_the_mean_over_the_window(side):
    """Each pixel becomes the mean over its window, the border's pixels repeated beyond it."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 8, 6), generator=generator, dtype=torch.uint8)
    found = blurred(pixels, side)
    assert found.dtype == torch.uint8
    assert found.shape == pixels.shape
    reach = side // 2
    image = pixels.numpy().astype(float)
    for y in range(8):
        for x in range(6):
            window = [
                image[:, :, min(max(y + dy, 0), 7), min(max(x + dx, 0), 5)]
                for dy in range(-reach, reach + 1)
                for dx in range(-reach, reach + 1)
            ]
            gap = np.abs(found[:, :, y, x].numpy() - np.mean(window, axis=0))
            assert gap.max() <= 0.5 + 1e-3


def test_blurred_leaves_flat_images_alone():
    """A flat image has nothing to blur, and a window of one pixel changes nothing."""
    flat = torch.full((1, 3, 32, 32), 201, dtype=torch.uint8)
    assert torch.equal(blurred(flat, 9), flat)


def test_pixel_features():
    """Images become vectors of 32x32 area means in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    pixels[0, 0, :2, :2] = 255
    pixels[1, 2, -2:, -2:] = 0
    found = pixel_features(pixels)
    assert found.shape == (2, 3 * 32 * 32)
    assert found[0, 0] == 1
    assert found[1, -1] == -1
    means = pixels.numpy().astype(float).reshape(2, 3, 32, 2, 32, 2).mean((3, 5)) / 127.5 - 1
    np.testing.assert_allclose(found.numpy(), means.reshape(2, -1), atol=1e-5)


def test_tap_features():
    """One vector an image of a unit vector a pool, the same whatever is beside it."""
    torch.manual_seed(0)
    teacher = empty_teacher(TeacherConfig(arch="vgg11", width=0.05, convention="symmetric"))
    for conv in teacher.convs.values():
        torch.nn.init.normal_(conv.weight, 0, (2 / conv.weight[0].numel()) ** 0.5)
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    found = tap_features(teacher, pixels, batch=2)
    # The last pool of a 32 px image is 1x1; down to 2x2 its one value counts four times.
    widths = [4 * channels for channels, _ in teacher.blocks]
    assert found.shape == (5, sum(widths))
    for part in found.split(widths, dim=1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(tap_features(teacher, pixels[3:4])[0], found[3])


def test_identity_groups():
    """Equal images share a number, and images that differ in one value do not."""
    pixels = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    pixels[1, 2, 3, 3] = 1
    pixels[3] = pixels[1]
    pixels[4] = 9
    assert identity_groups(pixels).tolist() == [0, 1, 0, 1, 2]


def test_identity_groups_of_a_view():
    """Images that lie in memory in another order are compared by their pixels all the same."""
    pixels = torch.randint(256, (3, 3, 4, 4), dtype=torch.uint8)
    strided = pixels.contiguous(memory_format=torch.channels_last)
    assert identity_groups(torch.cat([pixels, strided])).tolist() == [0, 1, 2, 0, 1, 2]


def test_probe_accuracy():
    """What is linear in the embedding is read off it, what is not there is guessed."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 5, generator=generator)
    sides = ["left" if value < 0 else "right" for value in rows[:, 2].tolist()]
    coins = torch.randint(2, (200,), generator=generator).tolist()
    random = ["heads" if coin else "tails" for coin in coins]
    assert probe_accuracy(rows[:150], sides[:150], rows[150:], sides[150:]) > 0.9
    assert 0.25 < probe_accuracy(rows[:150], random[:150], rows[150:], random[150:]) < 0.75
    wrong = ["right" if side == "left" else "left" for side in sides[150:]]
    assert probe_accuracy(rows[:150], sides[:150], rows[150:], wrong) < 0.1

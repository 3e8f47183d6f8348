"""Vectors, blurs and probes against what they are defined as."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdn.config import TeacherConfig
from sdn.metrics import blurred, first_alike, pixel_features, probe_accuracy, tap_features
from sdn.teacher import empty_teacher


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


def test_first_alike():
    """Equal images name the first of them, and images that differ in one value do not."""
    pixels = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    pixels[1, 2, 3, 3] = 1
    pixels[3] = pixels[1]
    pixels[4] = 9
    assert first_alike(pixels).tolist() == [0, 1, 0, 1, 4]


def test_first_alike_of_a_view():
    """Images that lie in memory in another order are compared by their pixels all the same."""
    pixels = torch.randint(256, (3, 3, 4, 4), dtype=torch.uint8)
    strided = pixels.contiguous(memory_format=torch.channels_last)
    assert first_alike(torch.cat([pixels, strided])).tolist() == [0, 1, 2, 0, 1, 2]


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

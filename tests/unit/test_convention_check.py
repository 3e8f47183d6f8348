"""Weights that are fed what they were not trained on are found out before training."""

from pathlib import Path

import pytest
import torch

from sdn.config import TeacherConfig
from sdn.convention_check import ALIKE, check_convention, likeness
from sdn.teacher import Teacher, drawn_teacher, load_weights

REAL_WEIGHTS = (
    Path(__file__).resolve().parents[3] / "shared" / "weights" / "vgg16-imagenet-conv.safetensors"
)


def images(count=8):
    """(N, 3, 16, 16) uint8, each of a colour of its own with some noise."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(256, (count, 3, 1, 1), generator=generator)
    noise = torch.randint(-20, 21, (count, 3, 16, 16), generator=generator)
    return (colours + noise).clamp(0, 255).to(torch.uint8)


def for_255(convention, scale=1.0):
    """One block that tells colours apart, with biases for 0..255 less the mean, over `scale`."""
    teacher = Teacher(((6, 1),), convention)
    with torch.no_grad():
        conv = teacher.convs["conv1_1"]
        conv.weight.zero_()
        for channel in range(3):
            conv.weight[channel, channel, 1, 1] = scale
            conv.weight[channel + 3, channel, 1, 1] = -scale
        conv.bias.fill_(20)
    return teacher


def test_likeness_is_the_mean_cosine_of_different_images():
    """Written out, pair by pair, on the deepest tap."""
    teacher, pixels = for_255("mean-255"), images(4)
    seen = teacher(pixels.float() / 127.5 - 1)["pool1"].flatten(1).double()
    cosines = [
        float(seen[i] @ seen[j] / (seen[i].norm() * seen[j].norm()))
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    assert likeness(teacher, pixels) == pytest.approx(sum(cosines) / 12, abs=1e-5)


def test_images_that_are_equal_are_wholly_alike():
    """And none of several conventions is better for them, so none is refused."""
    pixels = images(1).expand(4, -1, -1, -1)
    assert likeness(for_255("imagenet"), pixels) == pytest.approx(1, abs=1e-5)
    check_convention(for_255("imagenet"), pixels)


@pytest.mark.parametrize("convention", ["imagenet", "symmetric"])
def test_a_convention_that_blinds_the_teacher_is_refused(convention):
    """With the one that suits the weights, and how alike images are under both."""
    told = r"alike to (1\.00|0\.9\d) .*pool1.*, with mean-255 to 0\.[0-6]\d.*of these mean-255 "
    with pytest.raises(ValueError, match=told):
        check_convention(for_255(convention), images())


def test_the_convention_that_suits_the_weights_passes():
    """As does a single image, from which nothing can be told."""
    check_convention(for_255("mean-255"), images())
    check_convention(for_255("imagenet"), images(1))


@pytest.mark.parametrize("convention", ["imagenet", "release"])
def test_weights_for_images_over_their_deviation_pass(convention):
    """As torchvision publishes them; and with the release's input, as its recipe has it."""
    deviation = 57.0  # 0.224 of 255
    check_convention(for_255(convention, deviation), images())


@pytest.mark.parametrize("convention", ["imagenet", "mean-255", "release", "symmetric"])
def test_drawn_weights_pass_whatever_they_are_fed(convention):
    """To them images are alike under each convention: none would be better."""
    config = TeacherConfig(arch="vgg16", width=0.25, epochs=0, convention=convention)
    pixels = images().repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert likeness(drawn_teacher(config), pixels) > ALIKE
    check_convention(drawn_teacher(config), pixels)


def test_a_dead_teacher_tells_nothing_apart():
    """Where its deepest tap is 0 for all images, they are alike."""
    teacher = for_255("mean-255")
    with torch.no_grad():
        teacher.convs["conv1_1"].bias.fill_(-1000)
    assert likeness(teacher, images()) == pytest.approx(1, abs=1e-5)


@pytest.mark.skipif(
    not REAL_WEIGHTS.is_file(), reason="ImageNet weights of VGG16 are not on this machine"
)
def test_weights_of_vggs_authors_are_refused_as_torchvisions():
    """The recipes' convention is that of torchvision's file; the authors' needs another."""
    pixels = images(16).repeat_interleave(4, 2).repeat_interleave(4, 3)
    wrong = TeacherConfig(arch="vgg16", weights=str(REAL_WEIGHTS))
    with pytest.raises(ValueError, match=r"convention=imagenet .* with (mean-255|release) to"):
        check_convention(load_weights(wrong), pixels)
    right = TeacherConfig(arch="vgg16", weights=str(REAL_WEIGHTS), convention="mean-255")
    check_convention(load_weights(right), pixels)

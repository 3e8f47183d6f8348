"""What critics see of an image."""

from __future__ import annotations

import pytest
import torch

from sdn.augmenting import NUMBERS, augmented, change_of


def change(brightness=0.5, saturation=0.5, contrast=0.5, up=0.5, left=0.5, y=2.0, x=2.0):
    """The change that does nothing, but for what is given; the hole lies outside."""
    return torch.tensor([[brightness, saturation, contrast, up, left, y, x]])


@pytest.fixture
def image():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_numbers_in_the_middle_change_nothing(image):
    """But rounding."""
    assert torch.allclose(augmented(image, change()), image, atol=1e-6)


def test_colours(image):
    """Brightness is added, saturation 0 is grey, contrast keeps the mean."""
    assert torch.allclose(augmented(image, change(brightness=1.0)), image + 0.5, atol=1e-6)
    grey = augmented(image, change(saturation=0.0))
    assert torch.allclose(grey, image.mean(1, keepdim=True).expand_as(image), atol=1e-6)
    flat = augmented(image, change(contrast=0.0))
    assert torch.allclose(flat.mean(), image.mean(), atol=1e-6)
    assert torch.allclose(flat.std(), image.std() / 2, atol=1e-3)


def test_moved(image):
    """By at most an eighth; what comes in from outside is 0."""
    found = augmented(image, change(up=0.999))
    assert torch.allclose(found[:, :, :14], image[:, :, 2:], atol=1e-6)
    assert (found[:, :, 14:] == 0).all()
    found = augmented(image, change(left=0.0))
    assert torch.allclose(found[..., 2:], image[..., :14], atol=1e-6)
    assert (found[..., :2] == 0).all()


def test_a_hole(image):
    """Of half the side less a pixel about its middle, cut off at the border."""
    found = augmented(image, change(y=0.5, x=0.0))
    hole = found[0, 0] == 0
    assert hole.sum() == 7 * 4
    assert hole[5:12, :4].all()


def test_a_synthetic_image_in_bfloat16_is_changed_like_the_real_one():
    """Moved by the same pixels and with the same hole, though its numbers are coarser."""
    numbers = torch.rand(256, NUMBERS, generator=torch.Generator().manual_seed(1))
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).add(1)
    image = image.expand(256, -1, -1, -1)
    numbers[:, :3] = 0.5  # colours as they are: then 0 is what moved in, and the hole
    real, synthetic = augmented(image, numbers), augmented(image.bfloat16(), numbers)
    assert torch.equal(real == 0, synthetic == 0)
    assert torch.allclose(real, synthetic, atol=0.02)


def test_a_change_belongs_to_a_name():
    """Not to the images beside it; each image of a batch is changed by its own numbers."""
    found = change_of(["a", "b"], seed=3)
    assert found.shape == (2, NUMBERS)
    assert torch.equal(change_of(["b"], seed=3)[0], found[1])
    images = torch.randn(2, 3, 16, 16)
    both = augmented(images, found)
    assert torch.allclose(augmented(images[1:], found[1:]), both[1:], atol=1e-6)


def test_gradients_pass(image):
    """Each pixel that is still seen has one; those moved out and in the hole have none.

    Where the contrast stays: a change of it looks at the mean of all pixels.
    """
    image = image.double().requires_grad_()
    numbers = change(0.9, 0.3, 0.8, 0.999, 0.5, 0.5, 0.5).double()
    assert torch.autograd.gradcheck(lambda x: augmented(x, numbers), (image,))
    augmented(image, change(0.9, up=0.999, y=0.5, x=0.5).double())[:, 0].sum().backward()
    seen = image.grad[0, 0] == 1
    assert not seen[:2].any()  # moved out
    assert not seen[7:14, 5:12].any()  # in the hole, two rows further up in the image that is seen
    assert seen.sum() == 14 * 16 - 7 * 7
    assert not image.grad[0][:, ~seen].any()

"""Images as their pixels will be: values, and which gradients come back."""

from __future__ import annotations

import torch

from sdn.clamping import clamped
from sdn.data.images import to_pixels

IMAGE = torch.tensor([-3.0, -1.1, -1.0, -0.5, 0.0, 0.5, 1.0, 1.1, 3.0])


def gradient_of(direction):
    """Of an image whose clamped form is to move against `direction`."""
    image = IMAGE.clone().requires_grad_()
    (clamped(image) * direction).sum().backward()
    return image.grad.tolist()


def test_a_clamped_image_has_the_same_pixels():
    """Looking at it, nobody could tell it from the image."""
    assert clamped(IMAGE).tolist() == [-1, -1, -1, -0.5, 0, 0.5, 1, 1, 1]
    assert torch.equal(to_pixels(clamped(IMAGE)), to_pixels(IMAGE))


def test_out_of_range_only_what_is_far_out_is_drawn_back():
    """Nothing is pushed further out; a little out of range stays as it is."""
    assert gradient_of(2.0) == [0, 0, 2, 2, 2, 2, 2, 0, 2]
    assert gradient_of(-2.0) == [-2, 0, -2, -2, -2, -2, -2, 0, 0]


def test_what_is_far_out_comes_back_to_the_margin():
    """And stays there: nearer, only weights that it shares with other values would move it."""
    image = torch.tensor([4.0, -4.0], requires_grad=True)
    optimizer = torch.optim.SGD([image], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (clamped(image) - torch.tensor([0.25, -0.5])).abs().sum().backward()
        optimizer.step()
    assert ((image.abs() > 1) & (image.abs() < 1.26)).all()

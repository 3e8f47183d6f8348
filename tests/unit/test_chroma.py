"""Chroma coarser than brightness: what goes, what stays."""

from __future__ import annotations

import pytest
import torch

from sdn.chroma import subsampled

RED = torch.tensor([1.0, -1.0, -1.0])
BLUE = torch.tensor([-1.0, -1.0, 1.0])
GREY = torch.tensor([0.25, 0.25, 0.25])


def columns(*colours):
    """(1, 3, 4, W), a colour a column."""
    return torch.stack(colours, dim=1)[None, :, None, :].expand(1, 3, 4, -1).contiguous()


def brightness(image):
    return 0.299 * image[:, 0] + 0.587 * image[:, 1] + 0.114 * image[:, 2]


def parts(image):
    """Cb and Cr of JPEG, on [-1, 1]: (B, 2, H, W)."""
    y = brightness(image)
    return torch.stack([(image[:, 2] - y) / 1.772, (image[:, 0] - y) / 1.402], dim=1)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_brightness_stays(factor):
    """Of each pixel, whatever its colours."""
    image = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(brightness(subsampled(image, factor)), brightness(image))


def test_factor_1_is_the_image():
    """Not even a copy of it."""
    image = torch.randn(1, 3, 4, 4)
    assert subsampled(image, 1) is image


def test_one_colour_stays_and_grey_keeps_every_detail():
    """There is no fine chroma in either."""
    image = columns(RED, RED, RED, RED)
    torch.testing.assert_close(subsampled(image, 4), image)
    grey = torch.randn(1, 1, 8, 8).expand(1, 3, 8, 8)
    torch.testing.assert_close(subsampled(grey, 2), grey)


def test_stripes_of_a_pixel_have_the_mean_colour():
    """Red and blue by turns: each pixel keeps its brightness, all have the same Cb and Cr."""
    image = columns(RED, BLUE, RED, BLUE)
    found = parts(subsampled(image, 2))
    torch.testing.assert_close(found, parts(image).mean((2, 3), keepdim=True).expand_as(found))


def test_half_precision_leaves_white_white():
    """Computed exactly and rounded once: a grey near white is as it was."""
    grey = torch.linspace(0.9, 1.1, 64).to(torch.bfloat16).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    found = subsampled(grey.contiguous(memory_format=torch.channels_last), 4)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, grey)


def test_an_edge_is_as_wide_as_bilinear_makes_it():
    """Means of two pixels lie at the middles of the pairs: a quarter and three on the way."""
    red, grey = (parts(columns(colour))[0, :, 0, 0] for colour in (RED, GREY))
    found = parts(subsampled(columns(RED, RED, GREY, GREY), 2))[0, :, 1]
    for share, colour in zip((0, 0.25, 0.75, 1), found.T, strict=True):
        torch.testing.assert_close(colour, (1 - share) * red + share * grey)

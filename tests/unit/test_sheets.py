"""Contact sheets show the images they are given, where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdn.sheets import contact_sheet

SIDE, MARGIN, TEXT, TOP = 64, 8, 200, 28


def images(count, seed, size=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def enlarged(image, factor):
    """(H, W, 3) pixels, each repeated `factor` times along both axes."""
    return np.repeat(np.repeat(image.permute(1, 2, 0).numpy(), factor, 0), factor, 1)


def corner(cell, column, columns, across):
    """Left and upper edge of an image on the sheet."""
    width = columns * (SIDE + MARGIN) + TEXT
    left = MARGIN + (cell % across) * width + column * (SIDE + MARGIN)
    return left, TOP + (cell // across) * (SIDE + MARGIN)


@pytest.mark.parametrize(("count", "across"), [(5, 2), (1, 3), (3, 3), (4, 1)])
def test_each_image_is_where_it_belongs(count, across):
    """Cell n holds image n of every column, pixel for pixel, each pixel twice as large."""
    columns = {"real": images(count, 0), "stage two": images(count, 1)}
    captions = [f"caption {n}" for n in range(count)]
    sheet = np.asarray(contact_sheet(columns, captions, side=SIDE, across=across))
    for cell in range(count):
        for number, pixels in enumerate(columns.values()):
            x, y = corner(cell, number, 2, across)
            found = sheet[y : y + SIDE, x : x + SIDE]
            np.testing.assert_array_equal(found, enlarged(pixels[cell], 2))


def test_size():
    """The sheet has as many rows of cells as it needs, and room for a footer where there is one."""
    columns = {"real": images(5, 0)}
    plain = contact_sheet(columns, ["a"] * 5, side=SIDE, across=2)
    assert plain.size == (2 * (SIDE + MARGIN + TEXT) + MARGIN, TOP + 3 * (SIDE + MARGIN))
    footed = contact_sheet(columns, ["a"] * 5, side=SIDE, across=2, footer="by nobody")
    assert footed.size[0] == plain.size[0]
    assert footed.size[1] > plain.size[1]
    below = np.asarray(footed)[plain.size[1] :]
    assert (below < 200).any()
    np.testing.assert_array_equal(np.asarray(footed)[: plain.size[1]], np.asarray(plain))


def test_captions_and_headings_are_drawn():
    """Headings stand above the first row, and each caption beside its own images."""
    columns = {"real": images(2, 0)}
    with_text = contact_sheet(columns, ["one", "two"], side=SIDE, across=1)
    sheet = np.asarray(with_text)
    assert (sheet[:TOP] < 128).any()
    for cell in range(2):
        x, y = corner(cell, 0, 1, 1)
        beside = sheet[y : y + SIDE, x + SIDE + MARGIN :]
        assert (beside < 128).any()
    bare = np.asarray(contact_sheet({"": images(2, 0)}, ["", ""], side=SIDE, across=1))
    assert (bare[:TOP] == 255).all()
    x, y = corner(0, 0, 1, 1)
    assert (bare[y : y + SIDE, x + SIDE :] == 255).all()


def test_long_captions_stay_in_their_cell():
    """A caption of many lines is cut where its cell ends."""
    columns = {"real": images(2, 0)}
    long = np.asarray(contact_sheet(columns, ["word " * 200, ""], side=SIDE, across=1))
    _, y = corner(1, 0, 1, 1)
    x = MARGIN + SIDE + MARGIN
    assert (long[y:, x:] == 255).all()


def test_images_of_another_size_are_scaled():
    """Images that do not fit a whole number of times are still drawn at the asked size."""
    flat = torch.full((1, 3, 48, 48), 77, dtype=torch.uint8)
    sheet = np.asarray(contact_sheet({"": flat}, [""], side=SIDE, across=1))
    x, y = corner(0, 0, 1, 1)
    assert (sheet[y : y + SIDE, x : x + SIDE] == 77).all()
    assert (sheet[y : y + SIDE, x + SIDE] == 255).all()

import io

import numpy as np
import pytest
import torch
from PIL import Image

from sdn.data import images
from sdn.data.images import decode, decode_prepared, encode, to_image, to_pixels


def file_of(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_png_of_the_right_size_comes_back_unchanged():
    """A PNG that already has the resolution gives exactly the pixels that went in."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for fit in ("pad", "resize", "crop"):
        assert np.array_equal(decode(encode(pixels, "png"), resolution=32, fit=fit), pixels)


def test_jpg_keeps_colour_resolution():
    """JPEG is written 4:4:4: one red and one blue column beside each other stay red and blue."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, ::2, 0] = 255
    pixels[:, 1::2, 2] = 255
    decoded = decode(encode(pixels, "jpg"), resolution=32, fit="pad").astype(int)
    assert np.abs(decoded - pixels).max() < 40


def test_encoding_is_deterministic_and_refuses_others():
    """Equal pixels give equal bytes; another format, shape or type is refused."""
    pixels = np.full((32, 32, 3), 7, np.uint8)
    assert encode(pixels, "png") == encode(pixels.copy(), "png")
    with pytest.raises(ValueError, match="'webp'"):
        encode(pixels, "webp")
    with pytest.raises(ValueError, match="float64"):
        encode(pixels.astype(float), "png")


def test_pad_shows_the_whole_image_on_white():
    """Pad centres a wide black image between white bars."""
    wide = decode(file_of(Image.new("RGB", (64, 32), "black")), resolution=32, fit="pad")
    assert (wide[:8] == 255).all()
    assert (wide[-8:] == 255).all()
    assert (wide[8:24] == 0).all()


def test_crop_takes_the_centre_and_resize_stretches():
    """Crop drops the red sides of a wide image; resize keeps them."""
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    blue = np.array([0, 0, 255])
    assert (decode(file_of(image), resolution=32, fit="crop") == blue).all()
    stretched = decode(file_of(image), resolution=32, fit="resize")
    assert stretched[16, 0].tolist() == [255, 0, 0]
    assert stretched[16, 16].tolist() == [0, 0, 255]


def test_unknown_fit_is_refused():
    """A fit that does not exist is named in the error."""
    with pytest.raises(ValueError, match="'stretch'"):
        decode(file_of(Image.new("RGB", (8, 4))), resolution=32, fit="stretch")


def test_extremely_narrow_image_still_shows():
    """An image of 1 x 1000 pixels becomes a square with one dark column."""
    narrow = decode(file_of(Image.new("RGB", (1, 1000), "black")), resolution=32, fit="pad")
    assert narrow.shape == (32, 32, 3)
    assert (narrow == 0).all(axis=(0, 2)).sum() == 1


def test_exif_orientation_is_applied():
    """An image marked as turned by 90 degrees is stood upright."""
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 32, 16))  # black above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is above comes to the right
    upright = decode(file_of(image, exif=exif), resolution=32, fit="pad")
    assert (upright[:, 16:] == 0).all()
    assert (upright[:, :16] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    """Fully transparent pixels are white, whatever colour they hide."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0)).convert(mode)
    options = {"transparency": image.getpixel((0, 0))} if mode == "P" else {}
    assert (decode(file_of(image, **options), resolution=32, fit="pad") == 255).all()


def test_half_transparency_is_mixed_with_white():
    """Black at half opacity is mid grey."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 128))
    assert (decode(file_of(image), resolution=32, fit="pad") == 127).all()


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (32, 32), 100), "PNG", [100, 100, 100]),
        (Image.new("1", (32, 32), 1), "PNG", [255, 255, 255]),
        (Image.new("P", (32, 32)), "GIF", [0, 0, 0]),
        (Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "TIFF", [255, 0, 0]),
        (Image.fromarray(np.full((32, 32), 257 * 100, np.uint16)), "PNG", [100, 100, 100]),
        (Image.fromarray(np.full((32, 32), 65535, np.uint16)), "TIFF", [255, 255, 255]),
        (Image.fromarray(np.full((32, 32), 257 * 100, np.int32)), "TIFF", [100, 100, 100]),
    ],
    ids=["grey", "bilevel", "palette", "cmyk", "16-bit-png", "16-bit-tiff", "32-bit-tiff"],
)
def test_every_mode_becomes_rgb(image, kind, expected):
    """Grey, bilevel, palette, CMYK and 16-bit images give the RGB values one sees."""
    pixels = decode(file_of(image, kind), resolution=32, fit="pad")
    assert pixels.dtype == np.uint8
    assert (pixels == np.array(expected)).all()


def test_grey_values_without_a_known_range_are_refused():
    """A float TIFF has no known range and is refused."""
    image = Image.fromarray(np.full((32, 32), 0.5, np.float32))
    with pytest.raises(ValueError, match="no known range"):
        decode(file_of(image, "TIFF"), resolution=32, fit="pad")


@pytest.mark.parametrize("kind", ["empty", "html", "cut"])
def test_undecodable_bytes_are_a_value_error(kind):
    """No image, an error page and a cut-off file each give a ValueError that says so."""
    whole = encode(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8), "png")
    data = {"empty": b"", "html": b"<html>404</html>", "cut": whole[: len(whole) // 2]}[kind]
    with pytest.raises(ValueError, match="cannot be decoded as an image"):
        decode(data, resolution=32, fit="pad")


def test_decompression_bomb_is_refused(monkeypatch):
    """An image of more pixels than allowed is refused before it is unpacked."""
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(ValueError, match="decompression bomb: 64 x 64 pixels"):
        decode(file_of(Image.new("RGB", (64, 64))), resolution=32, fit="pad")


def test_prepared_image_must_be_what_preparation_writes():
    """What is read from a shard must have the size and mode that preparation gives."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    assert np.array_equal(decode_prepared(encode(pixels, "png"), 32), pixels)
    with pytest.raises(ValueError, match="64 x 64"):
        decode_prepared(encode(pixels, "png"), 64)
    with pytest.raises(ValueError, match="'L'"):
        decode_prepared(file_of(Image.new("L", (32, 32))), 32)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_prepared(b"", 32)


def test_pixels_survive_becoming_an_image():
    """All 256 values go to [-1, 1] and come back exactly."""
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, -1, -1)
    image = to_image(pixels)
    assert image.dtype == torch.float32
    assert (image.min(), image.max()) == (-1, 1)
    assert torch.equal(to_pixels(image), pixels)


def test_to_pixels_clamps_and_rounds():
    """Values beyond [-1, 1] are clamped; others go to the nearest pixel value."""
    image = torch.tensor([-3.0, 3.0, 0.004, 100.6 / 127.5 - 1]).reshape(1, 1, 1, 4)
    assert to_pixels(image).flatten().tolist() == [0, 255, 128, 101]


def test_value_ranges_cannot_be_mixed_up():
    """A float is no pixel tensor, and uint8 is no image."""
    with pytest.raises(ValueError, match="uint8"):
        to_image(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="float"):
        to_pixels(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))

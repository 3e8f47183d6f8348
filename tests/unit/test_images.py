import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from sdn.data import images
from sdn.data.images import decode, decode_jpeg_into, decode_prepared, encode, to_image, to_pixels


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


def test_decompression_bomb_is_refused():
    """An image of more pixels than allowed is refused; one of as many is not."""
    data = file_of(Image.new("RGB", (64, 64)))
    with pytest.raises(ValueError, match="decompression bomb: 64 x 64 pixels, at most 4095"):
        decode(data, resolution=32, fit="pad", max_pixels=64 * 64 - 1)
    assert decode(data, resolution=32, fit="pad", max_pixels=64 * 64).shape == (32, 32, 3)


def png(width, height, colour_type, rows, *, bits=16, transparency=None):
    """A PNG put together by hand: what Pillow cannot write."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"tRNS", transparency) if transparency else b"",
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


@pytest.mark.parametrize("side", [10_000, 15_000, 50_000, 2**31 - 1])
def test_bomb_is_refused_from_its_header(side, monkeypatch):
    """Whatever size a header claims, no pixel is unpacked to refuse it."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("unpacked"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match="decompression bomb"):
            decode(png(side, side, 2, b"", bits=8), resolution=32, fit="pad")


@pytest.mark.parametrize(
    ("colour_type", "values", "transparency", "expected"),
    [
        (2, [65535, 257 * 7, 0], None, [255, 7, 0]),
        (6, [0, 0, 0, 0], None, [255, 255, 255]),
        (4, [0, 0], None, [255, 255, 255]),
        (4, [257 * 9, 65535], None, [9, 9, 9]),
        (0, [257 * 9], None, [9, 9, 9]),
        (0, [257 * 9], [257 * 9], [255, 255, 255]),
        (2, [257 * 5, 257 * 7, 0], [257 * 5, 257 * 7, 0], [255, 255, 255]),
    ],
    ids=["rgb", "rgba", "la", "la-opaque", "grey", "grey-trns", "rgb-trns"],
)
def test_png_of_16_bits_becomes_8_bits(colour_type, values, transparency, expected):
    """All kinds of 16-bit PNG give the 8-bit values one sees, transparency as white."""
    row = b"\0" + np.array(values * 32, ">u2").tobytes()
    trns = np.array(transparency, ">u2").tobytes() if transparency else None
    data = png(32, 32, colour_type, row * 32, transparency=trns)
    assert (decode(data, resolution=32, fit="pad") == np.array(expected)).all()


def test_big_endian_tiff_of_16_bits_is_grey():
    """A TIFF of either byte order gives the same greys."""
    image = Image.frombytes("I;16B", (32, 32), np.full((32, 32), 257 * 100, ">u2").tobytes())
    assert (decode(file_of(image, "TIFF"), resolution=32, fit="pad") == 100).all()


@pytest.mark.parametrize("colour", [(255, 0, 0), [0, 0, 255]])
def test_transparent_colour_of_an_rgb_png_becomes_white(colour):
    """The one colour that tRNS declares transparent is white, others stay."""
    image = Image.new("RGB", (32, 32), tuple(colour))
    image.paste("lime", (0, 0, 32, 16))
    pixels = decode(file_of(image, transparency=tuple(colour)), resolution=32, fit="pad")
    assert (pixels[16:] == 255).all()
    assert (pixels[:16] == [0, 255, 0]).all()


def test_palette_with_alpha_is_laid_on_white():
    """Palette images whose entries have alpha, and the mode PA, are mixed with white."""
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 0, 0, 0])
    pixels = decode(file_of(image, transparency=bytes([0, 128])), resolution=32, fit="pad")
    assert (pixels == 127).all()
    both = images._to_rgb(Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert("PA"))
    assert (np.asarray(both) == 255).all()


def cmyk_jpeg(planes, transform):
    """A JPEG of four components with Adobe's mark; transform 0 is CMYK, 2 is YCCK."""
    data = file_of(Image.new("CMYK", (32, 32), planes), "JPEG", quality=100)
    mark = data.index(b"Adobe")
    return data[: mark + 11] + bytes([transform]) + data[mark + 12 :]


def test_cmyk_jpeg_has_the_colours_that_were_put_in():
    """Four components are ink, inverted in the file as Adobe writes them."""
    for ink, seen in (((0, 255, 255, 0), [255, 0, 0]), ((0, 0, 0, 255), [0, 0, 0])):
        pixels = decode(cmyk_jpeg(ink, 0), resolution=32, fit="pad")
        assert np.abs(pixels - np.array(seen)).max() <= 3


def test_ycck_jpeg_is_read_as_luma_and_chroma():
    """With Adobe's transform 2 the first three components are Y, Cb, Cr of the three inks."""
    # The inks of red are 0, 255, 255: Y 179, Cb 171, Cr 1. `cmyk_jpeg` stores 255 - value.
    pixels = decode(cmyk_jpeg((255 - 179, 255 - 171, 254, 0), 2), resolution=32, fit="pad")
    assert np.abs(pixels - np.array([255, 0, 0])).max() <= 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(kind):
    """Of several frames the first counts."""
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(data, resolution=32, fit="pad") == [255, 0, 0]).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_file_is_refused(kind):
    """A file cut off anywhere in its pixels is not completed with grey."""
    pixels = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = file_of(Image.fromarray(pixels), kind)
    for share in (0.3, 0.6, 0.9):
        with (
            warnings.catch_warnings(action="ignore"),
            pytest.raises(ValueError, match="cannot be decoded as an image"),
        ):
            decode(whole[: int(len(whole) * share)], resolution=32, fit="pad")


def test_unknown_format_is_refused_in_the_same_words():
    """The reason names the formats and holds nothing that changes from run to run."""
    with pytest.raises(ValueError, match=r"\(4 bytes\): none of PNG, JPEG") as raised:
        decode(b"%!PS", resolution=32, fit="pad")
    assert "0x" not in str(raised.value)


def test_images_load_without_torch():
    """Processes that prepare images do not load torch for it."""
    code = "import sys, sdn.data.images, sdn.data.preparation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def oriented(image, orientation, kind="PNG"):
    """A file that shows `image` once its EXIF orientation is applied."""
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    method = images._UPRIGHT.get(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image if method is None else image.transpose(method)
    return stored, file_of(stored, kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_stood_upright(orientation, kind):
    """All eight give the picture that the camera saw, whether Pillow turns it or not."""
    upright = Image.fromarray(np.random.default_rng(3).integers(0, 256, (20, 32, 3), np.uint8))
    _, data = oriented(upright, orientation, kind)
    expected = decode(file_of(upright), resolution=32, fit="pad")
    assert np.array_equal(decode(data, resolution=32, fit="pad"), expected)


@pytest.mark.parametrize(
    ("orientation", "corner"),
    # Where the first stored row and column lie, as the EXIF standard has it.
    [
        (1, "top left"),
        (2, "top right"),
        (3, "bottom right"),
        (4, "bottom left"),
        (5, "top left"),
        (6, "top right"),
        (7, "bottom right"),
        (8, "bottom left"),
    ],
)
def test_first_stored_pixel_comes_to_the_corner_of_the_standard(orientation, corner):
    """The pixel stored first lies in the corner where the standard puts row 0 and column 0."""
    image = Image.new("RGB", (32, 32), "white")
    image.putpixel((0, 0), (0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0))  # the row goes along the side, or down for 5 to 8
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(file_of(image, exif=exif), resolution=32, fit="pad")
    y, x = -("bottom" in corner), -("right" in corner)
    along_y, along_x = (1 - 2 * ("bottom" in corner), 1 - 2 * ("right" in corner))
    red = (y, x + along_x) if orientation < 5 else (y + along_y, x)
    assert pixels[y, x].tolist() == [0, 0, 0]
    assert pixels[red].tolist() == [255, 0, 0]


def test_orientation_that_cannot_be_read_is_none():
    """Nonsense in the tag does not cost the picture."""
    upright = Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 32, 3), np.uint8))
    for value in (0, 9, 1000):
        exif = Image.Exif()
        exif[0x0112] = value
        data = file_of(upright, exif=exif)
        assert np.array_equal(decode(data, resolution=32, fit="pad"), np.asarray(upright))
    data = file_of(upright, exif=b"Exif\0\0nonsense")
    assert np.array_equal(decode(data, resolution=32, fit="pad"), np.asarray(upright))


def test_box_cuts_out_the_square_about_the_object():
    """The square has 1.5 times the longer side of the box, about its centre, in whole pixels."""
    pixels = np.random.default_rng(4).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    # Centre (50, 43), longer side 44: 33 to each side, that is 17..83 by 10..76.
    cut = decode(encode(pixels, "png"), resolution=96, fit="box", box=(28.0, 33.0, 44.0, 20.0))
    expected = Image.fromarray(pixels[10:76, 17:83]).resize((96, 96), Image.Resampling.BICUBIC)
    assert np.array_equal(cut, np.asarray(expected))


def test_box_at_the_edge_is_cut_off_there_and_stretched():
    """What lies outside the image is not made up; the rest becomes the square."""
    pixels = np.random.default_rng(5).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    # Centre (10, 50), longer side 20: 15 to each side, that is -5..25 by 35..65.
    cut = decode(encode(pixels, "png"), resolution=32, fit="box", box=(0.0, 40.0, 20.0, 20.0))
    assert np.array_equal(
        cut,
        np.asarray(Image.fromarray(pixels[35:60, 0:25]).resize((32, 32), Image.Resampling.BICUBIC)),
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_box_is_one_of_the_stored_image(orientation, kind):
    """Whatever the orientation, the stored pixels inside the box are those that are cut out."""
    upright = Image.fromarray(np.random.default_rng(6).integers(0, 256, (40, 70, 3), np.uint8))
    stored, data = oriented(upright, orientation, kind)
    box = (8.0, 12.0, 16.0, 12.0)  # centre (16, 18), 12 to each side: 4..28 by 6..30
    cut = decode(data, resolution=64, fit="box", box=box)
    exif = Image.Exif()
    exif[0x0112] = orientation
    piece = file_of(stored.crop((4, 6, 28, 30)), exif=exif)
    assert np.array_equal(cut, decode(piece, resolution=64, fit="resize"))


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        (None, "no box: data.fit is 'box'"),
        ((0, 0, 0, 5), "width > 0"),
        ((0, 0, 5, float("nan")), "width > 0"),
        ((float("inf"), 0, 5, 5), "width > 0"),
        ((90, 90, 10, 10), "lies outside the image of 32 x 32 pixels"),
        ((-90, 0, 10, 10), "lies outside the image"),
    ],
)
def test_unusable_box_is_refused(box, reason):
    """No box, an empty one, and one beside the image are each refused with the reason."""
    with pytest.raises(ValueError, match=reason):
        decode(file_of(Image.new("RGB", (32, 32))), resolution=32, fit="box", box=box)


def smooth_or_random(number):
    """(64, 64, 3) uint8: noise, or a smooth picture."""
    rng = np.random.default_rng(number)
    size = 64 if number % 2 else 4
    noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
    return np.asarray(noise.resize((64, 64), Image.Resampling.BICUBIC))


def test_both_decoders_give_equal_pixels(monkeypatch):
    """A prepared JPEG has the same pixels with simplejpeg and without it, bit for bit."""
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed: nothing to compare")
    files = [encode(smooth_or_random(number), "jpg") for number in range(50)]
    files += [
        file_of(Image.fromarray(smooth_or_random(n)), "JPEG", quality=80, subsampling=n % 3)
        for n in range(12)
    ]
    fast = [decode_prepared(data, 64) for data in files]
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    assert all(
        np.array_equal(pixels, decode_prepared(data, 64))
        for pixels, data in zip(fast, files, strict=True)
    )


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    """Each of the two decoders in turn."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    else:
        monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    return request.param


def test_jpeg_is_decoded_where_it_is_needed(decoder):
    """One row of a batch is filled, and the others stay as they are."""
    batch = np.full((3, 64, 64, 3), 7, np.uint8)
    data = encode(smooth_or_random(1), "jpg")
    decode_jpeg_into(data, batch[1])
    assert np.array_equal(batch[1], decode_prepared(data, 64))
    assert (batch[[0, 2]] == 7).all()


def test_jpeg_that_does_not_fit_is_refused(decoder):
    """Another size, a cut file, a PNG and nothing: each is a ValueError."""
    out = np.zeros((64, 64, 3), np.uint8)
    whole = encode(smooth_or_random(1), "jpg")
    for size in ((32, 64), (64, 32), (32, 32), (128, 128)):
        with pytest.raises(ValueError, match=r"expected RGB, 64 x 64 pixels|buffer is too small"):
            decode_jpeg_into(file_of(Image.new("RGB", size), "JPEG"), out)
    for data in (
        whole[: len(whole) // 2],
        whole[:30],
        b"",
        b"\xff\xd8",
        file_of(Image.new("L", (8, 8))),
    ):
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode_jpeg_into(data, out)


def test_unfit_target_is_refused(decoder):
    """The target must be contiguous uint8 of three dimensions."""
    data = encode(smooth_or_random(1), "jpg")
    for out in (
        np.zeros((64, 64, 3), np.float32),
        np.zeros((64, 64, 6), np.uint8)[:, :, ::2],
        np.zeros(64 * 64 * 3, np.uint8),
    ):
        with pytest.raises(ValueError, match=r"expected contiguous \(H, W, 3\) uint8"):
            decode_jpeg_into(data, out)


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

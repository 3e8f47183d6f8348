"""Encoded files to pixels and back, pixels to images and back: value ranges change only here."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

# torch is imported where it is used: the processes that only prepare images do without it.
if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray
    from torch import Tensor

    from sdn.config import Fit

Box = tuple[float, float, float, float]

MAX_PIXELS = 64_000_000
"""Largest image accepted unless told otherwise; more is taken for a decompression bomb."""
BOX_MARGIN = 1.5
"""Side of the square about an object's box over the longer side of the box."""

# Without the formats for which Pillow starts other programs (EPS), and the exotic ones.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_BYTE_MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
)
_JPEG_RGB = ("YCbCr", "RGB")
"""What a JPEG may hold that becomes RGB without loss of a channel."""
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Value of the tag -> what stands the image upright."""


def decode(
    data: bytes, *, resolution: int, fit: Fit, box: Box | None = None, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """The encoded image as a square of RGB pixels.

    EXIF orientation is applied, transparency laid on white, an animation gives its first frame.
    Colour profiles are ignored.

    Args:
        data: PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF.
        resolution: height and width of the result in pixels.
        fit: "pad" keeps the whole image and adds white borders, "resize" stretches it, "crop" cuts
            the largest square out of its centre, "box" cuts the square about the object out.
        box: where the object is: left, top, width, height in pixels of the image as it is stored,
            that is before its EXIF orientation is applied. Used by the fit "box" alone.
        max_pixels: more are refused, before they are unpacked. (Pillow itself refuses more than
            179 million, whatever is set here.)

    Returns:
        (H, W, 3) uint8, RGB, 0..255.

    Raises:
        ValueError: not an image, a damaged one, a too large one, or one without the box it needs.
    """
    rgb, orientation = _decoded(data, max_pixels)
    if fit == "box":
        if box is None:
            raise ValueError(
                "no box: data.fit is 'box', but the source says nothing about where the object is"
            )
        rgb = rgb.crop(_square_about(_upright_box(box, orientation, rgb.size), rgb.size))
    # A square about a box is cut off at the image's edges, and stretched, as it is by GANs on CUB.
    square = _to_square(rgb, resolution, "resize" if fit == "box" else fit)
    return np.array(square)


def decode_prepared(data: bytes, resolution: int) -> NDArray[np.uint8]:
    """An image that preparation has written, as (H, W, 3) uint8 pixels without any change.

    Raises:
        ValueError: not a PNG or JPEG, damaged, not RGB, or not `resolution` pixels square.
    """
    if _simplejpeg() is not None and data.startswith(b"\xff\xd8"):
        pixels = np.empty((resolution, resolution, 3), np.uint8)
        decode_jpeg_into(data, pixels)
        return pixels
    return _prepared(data, (resolution, resolution), ("PNG", "JPEG"))


def decode_jpeg_into(data: bytes, out: NDArray[np.uint8]) -> None:
    """The pixels of a JPEG that preparation has written, decoded where they are needed.

    The hot path of training: the header is not read beforehand, which took a tenth of the time.

    Args:
        data: the file.
        out: (H, W, 3) uint8, contiguous; overwritten, even where an error is raised.

    Raises:
        ValueError: not a JPEG, damaged, not of the size of `out`, or `out` is unfit.
    """
    if out.dtype != np.uint8 or out.ndim != 3 or not out.flags.c_contiguous:
        raise ValueError(f"expected contiguous (H, W, 3) uint8, got {out.shape} {out.dtype}")
    library = _simplejpeg()
    if library is None:
        height, width = out.shape[:2]
        out[:] = _prepared(data, (width, height), ("JPEG",))
        return
    try:
        found = library.decode_jpeg(data, "RGB", False, False, 0, 0, 1, out)
    except ValueError as error:
        raise ValueError(_undecodable(data, error)) from error
    # The decoder would be content with a smaller image.
    if found.shape != out.shape:
        raise ValueError(_unexpected(out.shape[1::-1], ("RGB", *found.shape[1::-1])))


def encode(pixels: NDArray[np.uint8], image_format: str) -> bytes:
    """(H, W, 3) uint8 RGB pixels as the bytes of a file; equal pixels give equal bytes.

    Args:
        pixels: (H, W, 3) uint8, 0..255.
        image_format: "png", or "jpg" (4:4:4, quality 95).

    Raises:
        ValueError: another format, shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
    buffer = io.BytesIO()
    if image_format == "png":
        Image.fromarray(pixels).save(buffer, "PNG")
    elif image_format == "jpg":
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    else:
        raise ValueError(f"image_format must be 'png' or 'jpg', not {image_format!r}")
    return buffer.getvalue()


def to_image(pixels: Tensor) -> Tensor:
    """Pixels as an image: uint8 0..255 to float32 in [-1, 1], same shape (B, 3, H, W).

    Raises:
        ValueError: not uint8.
    """
    import torch

    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, not {pixels.dtype}")
    return pixels.float().div_(127.5).sub_(1.0)


def to_pixels(image: Tensor) -> Tensor:
    """An image as pixels: float in [-1, 1], clamped, to the nearest uint8 in 0..255, same shape.

    Raises:
        ValueError: not a float tensor.
    """
    import torch

    if not image.is_floating_point():
        raise ValueError(f"an image must be float, not {image.dtype}")
    return image.detach().float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)


def _decoded(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """The upright image in RGB, and the orientation in which it was stored."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _refuse_bomb(image.size, max_pixels)
            stored = _orientation(image)
            image.load()
            # Pillow turns a TIFF while it loads, and takes its tag away.
            left = _UPRIGHT.get(_orientation(image))
            rgb = _to_rgb(image)
        return (rgb if left is None else rgb.transpose(left)), stored
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"refused as a decompression bomb: {error}") from error
    # Decoders raise whatever they like on damaged bytes: SyntaxError, KeyError, struct.error, ...
    except Exception as error:
        raise ValueError(_undecodable(data, error)) from error


def _prepared(data: bytes, size: tuple[int, int], formats: tuple[str, ...]) -> NDArray[np.uint8]:
    """The pixels of an image of this width and height, by Pillow."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            found = (image.mode, *image.size)
            pixels = np.array(image)
    except Exception as error:  # as in `_decoded`
        raise ValueError(_undecodable(data, error)) from error
    if found != ("RGB", *size):
        raise ValueError(_unexpected(size, found))
    return pixels


def _undecodable(data: bytes, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text has an address in it
        error = ValueError(f"none of {', '.join(_formats())}")
    return f"cannot be decoded as an image ({len(data)} bytes): {error}"


def _unexpected(size: tuple[int, ...], found: tuple[str, int, int]) -> str:
    return f"expected RGB, {size[0]} x {size[1]} pixels, got {found}"


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the accepted formats that this Pillow knows."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def _simplejpeg() -> ModuleType | None:
    """The library that decodes a JPEG in a fraction of Pillow's time, where it is installed."""
    try:
        import simplejpeg  # type: ignore[import-untyped]
    except ImportError:
        return None
    return cast("ModuleType", simplejpeg)


def _refuse_bomb(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels, at most {max_pixels} are accepted"
        )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 where there is none to be read."""
    try:
        value = image.getexif().get(_ORIENTATION)
    # A damaged tag is no reason to give up a picture.
    except Exception:  # noqa: BLE001
        return 1
    return value if value in _UPRIGHT else 1


def _upright_box(box: Box, orientation: int, size: tuple[int, int]) -> Box:
    """The box of a stored image in the upright one of this width and height."""
    left, top, width, height = box
    if orientation >= 5:  # mirrored at the diagonal, and then as 1, 4, 2 or 3
        left, top, width, height = top, left, height, width
    if orientation in (2, 3, 6, 7):
        left = size[0] - left - width
    if orientation in (3, 4, 7, 8):
        top = size[1] - top - height
    return left, top, width, height


def _square_about(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The square about a box's centre, cut off at the image's edges: left, top, right, bottom.

    Source: Zhang et al. 2017 (StackGAN), arXiv:1612.03242, its preparation of CUB, whole pixels.
    """
    left, top, width, height = box
    if not (width > 0 and height > 0 and np.isfinite(box).all()):
        raise ValueError(f"a box has left, top, width > 0 and height > 0, not {box}")
    reach = int(max(width, height) * BOX_MARGIN / 2)
    x, y = int(left + width / 2), int(top + height / 2)
    square = (
        max(0, x - reach),
        max(0, y - reach),
        min(size[0], x + reach),
        min(size[1], y + reach),
    )
    if square[0] >= square[2] or square[1] >= square[3]:
        raise ValueError(f"the box {box} lies outside the image of {size[0]} x {size[1]} pixels")
    return square


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; transparency on white."""
    if image.mode not in _BYTE_MODES:
        image = _to_grey(image)
    if image.mode not in _ALPHA_MODES and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """16-bit grey (modes I;16 and I) as 8-bit grey: 65535 becomes 255; transparency on white."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values beyond 16 bits (mode {image.mode}) have no known range")
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = 65535
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _to_square(image: Image.Image, resolution: int, fit: Fit) -> Image.Image:
    square = (resolution, resolution)
    width, height = image.size
    bicubic = Image.Resampling.BICUBIC
    if fit == "resize" or width == height:
        return image if image.size == square else image.resize(square, bicubic)
    # Departs from the paper, which stretches: below, things keep their proportions.
    if fit == "crop":
        left, top = max(0, width - height) / 2, max(0, height - width) / 2
        return image.resize(square, bicubic, box=(left, top, width - left, height - top))
    if fit == "pad":
        scale = resolution / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        canvas = Image.new("RGB", square, "white")
        corner = ((resolution - inner[0]) // 2, (resolution - inner[1]) // 2)
        canvas.paste(image.resize(inner, bicubic), corner)
        return canvas
    raise ValueError(f"fit must be 'pad', 'resize', 'crop' or 'box', not {fit!r}")

"""Encoded files to pixels and back, pixels to images and back: value ranges change only here."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from sdn.config import Fit

MAX_PIXELS = 64_000_000
"""Largest image accepted, in pixels; more is taken for a decompression bomb."""

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
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


def decode(data: bytes, *, resolution: int, fit: Fit) -> NDArray[np.uint8]:
    """The encoded image as a square of RGB pixels.

    EXIF orientation is applied, transparency laid on white, an animation gives its first frame.
    Colour profiles are ignored.

    Args:
        data: PNG, JPEG, WebP, GIF, BMP, TIFF, or whatever else Pillow reads.
        resolution: height and width of the result in pixels.
        fit: "pad" keeps the whole image and adds white borders, "resize" stretches it, "crop" cuts
            the largest square out of its centre.

    Returns:
        (H, W, 3) uint8, RGB, 0..255.

    Raises:
        ValueError: not an image, a damaged one, or one of more than `MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _refuse_bomb(image.size)
            image.load()
            rgb = _to_rgb(ImageOps.exif_transpose(image))
        return np.asarray(_to_square(rgb, resolution, fit)).copy()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"refused as a decompression bomb: {error}") from error
    # Decoders raise whatever they like on damaged bytes: SyntaxError, KeyError, struct.error, ...
    except Exception as error:
        raise ValueError(f"cannot be decoded as an image ({len(data)} bytes): {error}") from error


def decode_prepared(data: bytes, resolution: int) -> NDArray[np.uint8]:
    """An image that preparation has written, as (H, W, 3) uint8 pixels without any change.

    Raises:
        ValueError: not a PNG or JPEG, damaged, not RGB, or not `resolution` pixels square.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            found = (image.mode, *image.size)
            pixels = np.array(image)
    except Exception as error:  # as in `decode`
        raise ValueError(f"cannot be decoded as an image ({len(data)} bytes): {error}") from error
    if found != ("RGB", resolution, resolution):
        raise ValueError(f"expected RGB, {resolution} x {resolution} pixels, got {found}")
    return pixels


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
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, not {pixels.dtype}")
    return pixels.float().div_(127.5).sub_(1.0)


def to_pixels(image: Tensor) -> Tensor:
    """An image as pixels: float in [-1, 1], clamped, to the nearest uint8 in 0..255, same shape.

    Raises:
        ValueError: not a float tensor.
    """
    if not image.is_floating_point():
        raise ValueError(f"an image must be float, not {image.dtype}")
    return image.detach().float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)


def _refuse_bomb(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels, at most {MAX_PIXELS} are accepted"
        )


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
    """16-bit grey (modes I;16 and I) as 8-bit grey: 65535 becomes 255."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values beyond 16 bits (mode {image.mode}) have no known range")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _to_square(image: Image.Image, resolution: int, fit: Fit) -> Image.Image:
    square = (resolution, resolution)
    width, height = image.size
    bicubic = Image.Resampling.BICUBIC
    if fit == "resize" or width == height:
        return image if image.size == square else image.resize(square, bicubic)
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
    raise ValueError(f"fit must be 'pad', 'resize' or 'crop', not {fit!r}")

"""Contact sheets: rows of images side by side with their captions, as one picture."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_MARGIN, _TEXT_WIDTH, _LINE = 8, 200, 15


def contact_sheet(
    columns: Mapping[str, Tensor],
    captions: Sequence[str],
    *,
    footer: str | None = None,
    side: int = 96,
    across: int = 3,
) -> Image.Image:
    """A sheet with one cell a caption: an image of each column, the caption beside them.

    Args:
        columns: heading -> (N, 3, H, W) uint8 pixels, the same N for each.
        captions: N of them.
        footer: a line under the sheet, such as the attribution of the images.
        side: pixels at which an image is drawn.
        across: cells a row.
    """
    font = ImageFont.load_default(12)
    cell_width = len(columns) * (side + _MARGIN) + _TEXT_WIDTH
    cell_height = side + _MARGIN
    rows = -(-len(captions) // across)
    top = 28
    size = (across * cell_width + _MARGIN, top + rows * cell_height + (24 if footer else 0))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for n, caption in enumerate(captions):
        left = _MARGIN + (n % across) * cell_width
        upper = top + (n // across) * cell_height
        for c, (heading, pixels) in enumerate(columns.items()):
            x = left + c * (side + _MARGIN)
            if n < across:
                draw.text((x, 6), heading, fill="black", font=font)
            image = Image.fromarray(pixels[n].permute(1, 2, 0).contiguous().numpy())
            resample = (
                Image.Resampling.NEAREST if side % image.width == 0 else Image.Resampling.BICUBIC
            )
            sheet.paste(image.resize((side, side), resample), (x, upper))
        lines = textwrap.wrap(caption, 28)[: side // _LINE]
        x = left + len(columns) * (side + _MARGIN)
        for k, line in enumerate(lines):
            draw.text((x, upper + 4 + k * _LINE), line, fill="black", font=font)
    if footer:
        draw.text((_MARGIN, size[1] - 20), footer, fill="dimgray", font=font)
    return sheet

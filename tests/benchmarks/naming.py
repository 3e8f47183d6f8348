"""Can what was drawn be named? Two numbered sheets to be named before their captions are seen.

    python tests/benchmarks/naming.py --data FOLDER --model FOLDER --out FOLDER

`drawn-1.png` to `drawn-4.png` have what the model draws for 64 test captions; `nearest-1.png` to
`nearest-4.png`, in another order, the training image that differs least by concept, gender, hair
and tone, which is the most that copying can do. The captions are those with the smallest digests,
so that nobody chose them; `captions.json` has them by sheet and number, for whoever judges the
answers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sdn.baselines import nearest_by_tone
from sdn.data.loader import load_split
from sdn.data.sources.openmoji import ATTRIBUTION
from sdn.sampling import open_synthesizer
from sdn.sheets import contact_sheet

if TYPE_CHECKING:
    from torch import Tensor

COUNT, ON_A_PAGE = 64, 16


def by_digest(captions: list[str], salt: str = "") -> list[int]:
    """Rows in the order of the SHA-256 of their captions."""
    return sorted(
        range(len(captions)),
        key=lambda row: hashlib.sha256((salt + captions[row]).encode()).hexdigest(),
    )


def sheets(data: Path, model: Path) -> dict[str, tuple[Tensor, list[str]]]:
    """Name of a sheet -> its (64, 3, H, W) uint8 images and their captions, by number."""
    test, train = load_split(data, "test"), load_split(data, "train")
    every = [found[0] for found in test.captions]
    rows = by_digest(every)[:COUNT]
    captions = [every[row] for row in rows]
    drawn = open_synthesizer(model).of_data(captions)
    nearest = nearest_by_tone([test.labels[row] for row in rows], train.labels)
    if nearest is None:
        raise SystemExit(f"the images of {data} have no tones: no nearest training image is known")
    # Another order, so that one sheet does not tell the answers of the other.
    order = by_digest(captions, salt="nearest ")
    return {
        "drawn": (drawn, captions),
        "nearest": (train.pixels[nearest[order, 0]], [captions[k] for k in order]),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--data", "--model", "--out"):
        parser.add_argument(name, type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = sheets(given.data, given.model)
    for name, (images, captions) in found.items():
        for page, first in enumerate(range(0, len(captions), ON_A_PAGE), start=1):
            part = images[first : first + ON_A_PAGE]
            numbers = [str(first + n) for n in range(1, len(part) + 1)]
            sheet = contact_sheet({"": part}, numbers, footer=ATTRIBUTION, side=192, across=4)
            sheet.save(given.out / f"{name}-{page}.png")
    key = {name: captions for name, (_, captions) in found.items()}
    (given.out / "captions.json").write_text(json.dumps(key, indent=1, ensure_ascii=False))
    print(f"both sheets and captions.json are in {given.out}")


if __name__ == "__main__":
    main()

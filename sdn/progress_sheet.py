"""Pictures of fixed captions as a training goes on: one small sheet a checkpoint."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING

import torch

from sdn.captions import open_encoder
from sdn.data.dataset import open_dataset
from sdn.data.images import to_pixels
from sdn.data.reading import ShardReader
from sdn.noise import coded
from sdn.sampling import ENCODER
from sdn.sheets import contact_sheet
from sdn.stage_run import new_student

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdn.checkpoint import Checkpoint
    from sdn.config import RunConfig
    from sdn.stage_run import StageInputs

CAPTIONS = 12
"""On a sheet."""


def sheet_of(config: RunConfig, inputs: StageInputs) -> Callable[[Checkpoint], bytes]:
    """What draws a checkpoint's sheet: the true image beside the generated one.

    The captions are of the validation split (of the training split where there is none), the same
    ones every time: those whose keys have the smallest digests.

    Args:
        config: of the run.
        inputs: data and captions.

    Returns:
        A checkpoint -> PNG. It computes on the CPU, in float32.
    """
    dataset = open_dataset(inputs.data)
    split = "validation" if dataset.samples("validation") else "train"
    reader = ShardReader(dataset, split, cache_gib=0)
    try:
        # Shards hold their samples in the order of the digests, so the first rows serve.
        count = min(CAPTIONS, int(reader.shards.samples[0]))
        found = reader.read_batch(
            torch.zeros(count, dtype=torch.int64).numpy(), torch.arange(count).numpy()
        )
    finally:
        reader.close()
    order = sorted(range(count), key=lambda n: hashlib.sha256(found.keys[n].encode()).digest())
    captions = [found.captions[n][0] for n in order]
    real = found.pixels[order].contiguous()
    text = open_encoder(inputs.captions / ENCODER).encode(captions)
    student = new_student(config).eval().requires_grad_(requires_grad=False)
    code = coded(text, student.noise, captions, seed=0)

    def draw(checkpoint: Checkpoint) -> bytes:
        student.load_state_dict(checkpoint.weights())
        with torch.inference_mode():
            made = to_pixels(student(code)["image"])
        about = f"step {checkpoint.step:,} of {checkpoint.steps:,}"
        sheet = contact_sheet({"real": real, "generated": made}, captions, footer=about)
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        return buffer.getvalue()

    return draw

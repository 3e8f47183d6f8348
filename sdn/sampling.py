"""Captions -> images, with a finished student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdn.captions import CharCnnRnn, SentenceEncoder, check_caption, open_encoder, save_encoder
from sdn.data.images import to_pixels
from sdn.student import Student
from sdn.teacher import channels_last

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STUDENT, ENCODER = "student.pt", "captions.pt"


@dataclass(frozen=True, kw_only=True)
class Synthesizer:
    """A frozen caption encoder and a finished student."""

    encoder: CharCnnRnn | SentenceEncoder
    student: Student
    resolution: int
    max_chars: int

    def __call__(self, captions: Sequence[str], batch: int = 64) -> Tensor:
        """One image a caption.

        Args:
            captions: at least one.
            batch: captions at a time.

        Returns:
            (N, 3, H, W) uint8 pixels, RGB.

        Raises:
            TypeError, ValueError: a caption that no picture can be made of.
        """
        return self.of_data([check_caption(caption, self.max_chars) for caption in captions], batch)

    def of_data(self, captions: Sequence[str], batch: int = 64) -> Tensor:
        """As calling, for captions of a data set: one that is too long is cut, as in training."""
        return torch.cat(
            [
                self.draw(self.encoder.encode(list(captions[i : i + batch])))
                for i in range(0, len(captions), batch)
            ]
        )

    @torch.inference_mode()
    def draw(self, text: Tensor) -> Tensor:
        """(B, D) embeddings -> (B, 3, H, W) uint8 pixels; float32, so that it is repeatable."""
        return to_pixels(self.student(text)["image"])


def save_synthesizer(
    folder: Path,
    encoder: CharCnnRnn | SentenceEncoder,
    weights: dict[str, Tensor],
    settings: dict[str, Any],
    max_chars: int,
) -> None:
    """Write all that generation needs into `folder`."""
    save_encoder(encoder, folder / ENCODER)
    saved = {"settings": settings, "weights": weights, "max_chars": max_chars}
    torch.save(saved, folder / STUDENT)


def open_synthesizer(folder: Path) -> Synthesizer:
    """The model written by `save_synthesizer`, frozen.

    Raises:
        FileNotFoundError: the folder does not hold one.
    """
    for name in (STUDENT, ENCODER):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no model: {name} is missing")
    saved = torch.load(folder / STUDENT, map_location="cpu", weights_only=True)
    student = open_student(folder)
    student.requires_grad_(requires_grad=False).eval()
    return Synthesizer(
        encoder=open_encoder(folder / ENCODER),
        student=channels_last(student),
        resolution=saved["settings"]["resolution"],
        max_chars=saved["max_chars"],
    )


def open_student(folder: Path) -> Student:
    """The student of a model folder, ready to be trained on."""
    saved = torch.load(folder / STUDENT, map_location="cpu", weights_only=True)
    settings = saved["settings"]
    student = Student(
        tuple((c, n) for c, n in settings["blocks"]),
        resolution=settings["resolution"],
        text_dim=settings["text_dim"],
        width=settings["width"],
    )
    student.load_state_dict(saved["weights"])
    return student

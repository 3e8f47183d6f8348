"""Captions -> images, with a finished student.

What a caption draws depends on the model, the caption and the seed alone, bit for bit on one
device: each is encoded and drawn by itself and by one CPU thread, so that neither the captions
beside it nor the number of threads choose a kernel that rounds in another way.
"""

from __future__ import annotations

import io
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdn.captions import (
    CharCnnRnn,
    SentenceEncoder,
    check_caption,
    normalise,
    open_encoder,
    save_encoder,
)
from sdn.config.networks import MOST_NOISE
from sdn.data.images import to_pixels
from sdn.noise import coded
from sdn.student import Student
from sdn.teacher import channels_last
from sdn.tensor_files import damaged, read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

STUDENT, ENCODER = "student.safetensors", "captions.safetensors"
_DRAWING = threading.RLock()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread for torch; the number is the process's, so one caller at a time."""
    with _DRAWING:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class Synthesizer:
    """A frozen caption encoder and a finished student."""

    encoder: CharCnnRnn | SentenceEncoder
    student: Student
    resolution: int
    max_chars: int
    noise_scale: float = 1.0
    """Standard deviation of the noise where a call names no other."""

    @property
    def noise(self) -> bool:
        """Whether the seed changes the image; the faithful student has no noise."""
        return self.student.noise > 0

    def __call__(
        self, captions: Sequence[str], *, seed: int = 0, noise_scale: float | None = None
    ) -> Tensor:
        """One image a caption.

        Args:
            captions: at least one.
            seed: of the noise, for models that have some.
            noise_scale: in place of the model's own, 0 to `MOST_NOISE`.

        Returns:
            (N, 3, H, W) uint8 pixels, RGB.

        Raises:
            TypeError, ValueError: a caption that no picture can be made of; of several the text
                names its position. A noise scale that is out of range.
        """
        scale = None if noise_scale is None else _in_range(noise_scale)
        return self.of_data(self._checked(captions), seed=seed, noise_scale=scale)

    @_one_thread()
    def of_data(
        self, captions: Sequence[str], *, seed: int = 0, noise_scale: float | None = None
    ) -> Tensor:
        """As calling, for captions of a data set: one that is too long is cut, as in training."""
        scale = self.noise_scale if noise_scale is None else noise_scale
        return torch.cat([self._drawn(caption, seed, scale) for caption in captions])

    @torch.inference_mode()
    def _drawn(self, caption: str, seed: int, noise_scale: float) -> Tensor:
        """(1, 3, H, W) uint8: one caption alone in float32, so repeatable."""
        text = self.encoder.encode([caption])
        # Noise is named by what the encoder reads, not by the embedding: a processor that rounds
        # the last bit otherwise would get another image altogether.
        read = normalise(caption)[: self.max_chars]
        code = coded(text, self.student.noise, [read], seed=seed, scale=noise_scale)
        return to_pixels(self.student(code)["image"])

    def _checked(self, captions: Sequence[str]) -> list[str]:
        """The captions, if a picture can be made of each."""
        if isinstance(captions, str):
            raise TypeError(f"expected a list of captions, not one text: {captions[:60]!r}")
        if len(captions) == 0:
            raise ValueError("nothing to draw: expected at least one caption")
        found = []
        for number, caption in enumerate(captions, start=1):
            try:
                found.append(check_caption(caption, self.max_chars))
            except (TypeError, ValueError) as error:
                if len(captions) == 1:
                    raise
                raise type(error)(f"number {number} of {len(captions)}: {error}") from error
        return found


def _in_range(noise_scale: float) -> float:
    if not 0 <= noise_scale <= MOST_NOISE:
        raise ValueError(f"the noise scale must be 0 to {MOST_NOISE:g}, not {noise_scale}")
    return noise_scale


def encode_png(pixels: Tensor, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG file; the same pixels and text give the same bytes.

    Args:
        pixels: (3, H, W) uint8, RGB.
        text: names and contents of its text chunks.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, content in (text or {}).items():
        info.add_itxt(name, content)
    file = io.BytesIO()
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def save_synthesizer(
    folder: Path,
    encoder: CharCnnRnn | SentenceEncoder,
    weights: dict[str, Tensor],
    settings: dict[str, Any],
    max_chars: int,
) -> None:
    """Write all that generation needs into `folder`."""
    save_encoder(encoder, folder / ENCODER)
    write_tensors(folder / STUDENT, weights, {**settings, "max_chars": max_chars})


def open_synthesizer(folder: Path) -> Synthesizer:
    """The model written by `save_synthesizer`, frozen.

    Raises:
        FileNotFoundError: the folder does not hold one.
        ValueError: one of its files is damaged.
    """
    for name in (STUDENT, ENCODER):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no model: {name} is missing")
    student, settings = _student(folder / STUDENT)
    student.requires_grad_(requires_grad=False).eval()
    return Synthesizer(
        encoder=open_encoder(folder / ENCODER),
        student=channels_last(student),
        resolution=settings["resolution"],
        max_chars=settings["max_chars"],
        noise_scale=settings["noise_scale"],
    )


def open_student(folder: Path) -> Student:
    """The student of a model folder, ready to be trained on.

    Raises:
        FileNotFoundError: the folder does not hold one.
        ValueError: its file is damaged.
    """
    return _student(folder / STUDENT)[0]


def _student(path: Path) -> tuple[Student, dict[str, Any]]:
    weights, settings = read_tensors(path)
    try:
        student = Student(
            tuple((c, n) for c, n in settings["blocks"]),
            resolution=settings["resolution"],
            text_dim=settings["text_dim"],
            width=settings["width"],
            noise=settings.get("noise", 0),
            condition=settings.get("condition", "top"),
            leak=float(settings.get("leak", 0)),
            chroma=int(settings.get("chroma", 1)),
        )
        student.load_state_dict(weights)
        int(settings["max_chars"])
        settings["noise_scale"] = _in_range(float(settings.get("noise_scale", 1)))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise damaged(path, error) from error
    return student, settings

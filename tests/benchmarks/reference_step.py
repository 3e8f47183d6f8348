"""A training step as the formula reads: eager float32, NCHW, every tap, autograd's own L1.

Kept beside ours to measure against; it shares nothing with `sdn.losses`, `sdn.stages` and
`sdn.trainer` but the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from sdn.student import Student
    from sdn.teacher import Teacher


class ReferenceStep:
    """Student, teacher and Adam, written down plainly."""

    def __init__(self, stage: str, student: Student, teacher: Teacher, rate: float) -> None:
        """Args:
        stage: "stage_one" or "stage_two".
        student: trained in place, made contiguous (NCHW).
        teacher: frozen.
        rate: of Adam.
        """
        self.stage = stage
        self.student = student.to(memory_format=torch.contiguous_format)
        self.teacher = teacher.to(memory_format=torch.contiguous_format)
        self.optimizer = torch.optim.Adam(student.parameters(), lr=rate, foreach=False, fused=False)

    def teacher_taps(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> all taps."""
        taps = {"image": image}
        x = image * self.teacher.factor + self.teacher.shift
        if self.teacher.convention == "release":
            x = x.flip(1)
        for name in self.teacher.names[1:]:
            if name.startswith("pool"):
                x = functional.avg_pool2d(x, 2)
            else:
                x = torch.relu(self.teacher.convs[name](x))
            taps[name] = x
        return taps

    def student_taps(self, text: Tensor) -> dict[str, Tensor]:
        """(B, D) -> all taps."""
        student = self.student
        channels, side = student.top
        x = torch.relu(student.fc6(torch.relu(student.fc7(text))))
        x = torch.relu(student.pool(x)).view(-1, channels, side, side)
        taps = {student.top_tap: x}
        for layer in student.layers:
            if layer.upsample:
                x = functional.interpolate(x, scale_factor=2, mode="nearest")
            else:
                x = student.convs[layer.tap](x)
                x = x if layer.tap == "image" else torch.relu(x)
            taps[layer.tap] = x
        return taps

    def losses(self, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        """tap name -> mean absolute distance."""
        made = self.student_taps(text)
        if self.stage == "stage_two":
            made = self.teacher_taps(made["image"])
        real = self.teacher_taps(image)
        return {name: (real[name] - made[name]).abs().mean() for name in real}

    def __call__(self, text: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """One step on (B, D) embeddings and (B, 3, H, W) uint8 pixels; returns its terms."""
        terms = self.losses(text, pixels.float() / 127.5 - 1)
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

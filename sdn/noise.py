"""Random numbers that belong to a sample: the same on any rank, after any resumption.

Departs from the paper: its student has no noise, so that one caption is one image.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def normal_rows(names: Iterable[str | bytes], size: int, *, seed: int, of: str) -> Tensor:
    """Standard normal numbers, a row a name: a function of name, seed and purpose alone.

    Args:
        names: of the rows.
        size: numbers in a row, Z.
        seed: other seeds give other rows.
        of: what they are for; draws for one purpose say nothing about those for another.

    Returns:
        (B, Z) float32 on the CPU.
    """
    return _rows(names, size, seed, of, torch.Tensor.normal_)


def uniform_rows(names: Iterable[str | bytes], size: int, *, seed: int, of: str) -> Tensor:
    """As `normal_rows`, uniform in [0, 1)."""
    return _rows(names, size, seed, of, torch.Tensor.uniform_)


def coded(
    text: Tensor, noise: int, names: Iterable[str | bytes], *, seed: int, scale: float = 1.0
) -> Tensor:
    """What a student reads: the text embedding, and beside it noise where it has some.

    Args:
        text: (B, D).
        noise: numbers of noise, Z.
        names: of the B rows; of others no noise is drawn.
        seed: see `normal_rows`.
        scale: standard deviation of the noise; that of training is 1. Less is the reduced
            temperature of Kingma & Dhariwal 2018, arXiv:1807.03039.

    Returns:
        (B, D + Z), on the device of `text`.
    """
    if noise == 0:
        return text
    drawn = normal_rows(names, noise, seed=seed, of="noise") * scale
    return torch.cat([text, drawn.to(text)], dim=1)


def _rows(
    names: Iterable[str | bytes], size: int, seed: int, of: str, fill: Callable[..., Tensor]
) -> Tensor:
    generator = torch.Generator()
    rows = []
    for name in names:
        known = name.encode() if isinstance(name, str) else name
        digest = hashlib.sha256(f"{of}/{seed}/".encode() + known).digest()
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
        rows.append(fill(torch.empty(size), generator=generator))
    return torch.stack(rows) if rows else torch.empty(0, size)

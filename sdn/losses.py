"""The distances of the method, one function per published term."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sdn.config import LossWeights
    from sdn.student import Taps


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference over batch and elements.

    Formula: d(a, b) = mean |a - b|
    Source: Yuan & Peng 2018, arXiv:1808.06801 (L1, averaged as in the authors' release).

    Args:
        a: any shape, float32 or bfloat16; the gradient flows here.
        b: the same shape; carries no gradient.

    Returns:
        scalar float32, >= 0; best 0.
    """
    result: Tensor = _Distance.apply(a, b)  # type: ignore[no-untyped-call]
    return result


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over batch and elements.

    Departs from the paper, whose distance is L1: to be compared with it.
    Formula: mean (a - b)^2

    Arguments and result as of `distance`.
    """
    return functional.mse_loss(a.float(), b.float())


class _Distance(torch.autograd.Function):
    """L1 in few cheap passes over memory, in the dtype of its input.

    22 taps make autograd's own form a third of a training step on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        difference = a - b
        ctx.save_for_backward(difference)
        # A sum per row of the batch, accumulated in float32 whatever the dtype, then their sum: in
        # bf16 eight times faster than a norm in float32, and within 0.1% of it. A row's sum passes
        # what float16 can hold.
        exact = None if a.dtype == torch.bfloat16 else torch.float32
        rows = difference.abs().sum(dim=tuple(range(1, a.ndim)), dtype=exact)
        return rows.float().sum() / a.numel()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference.sign().mul_(gradient / difference.numel()), None


def wanted_taps(names: Iterable[str], weights: LossWeights) -> tuple[str, ...]:
    """The taps whose weight is not 0, in the order given."""
    return tuple(name for name in names if weights.of(name) > 0)


def tap_losses(
    student: Taps,
    teacher: Taps,
    weights: LossWeights,
    scales: Mapping[str, float],
    kind: Literal["l1", "l2"] = "l1",
) -> dict[str, Tensor]:
    """Weighted distance between each student tap and the teacher's tap of the same name.

    Formula: loss[l] = weights[l] * scales[l] * d(teacher[l], student[l]); for l2 scales[l]^2
    Source: Yuan & Peng 2018, arXiv:1808.06801; the release sums 22 such terms with weight 1.

    Args:
        student: tap name -> (B, C_l, H_l, W_l); taps that `teacher` lacks are ignored.
        teacher: the wanted taps, same shapes; carries no gradient.
        weights: dimensionless, >= 0.
        scales: tap name -> factor that stands for the unit of the distance; 1 where absent.
        kind: l1 as published, or l2 (`squared_distance`).

    Returns:
        tap name -> scalar float32, >= 0; best 0.

    Raises:
        ValueError: a tap is missing or its shape differs; the text names it and both shapes.
    """
    losses = {}
    for name, target in teacher.items():
        if name not in student or student[name].shape != target.shape:
            came = tuple(student[name].shape) if name in student else "nothing"
            raise ValueError(f"tap {name}: student has {came}, teacher {tuple(target.shape)}")
        scale = scales.get(name, 1.0)
        if kind == "l1":
            losses[name] = weights.of(name) * scale * distance(student[name], target)
        else:
            found = squared_distance(student[name], target)
            losses[name] = weights.of(name) * scale**2 * found
    return losses

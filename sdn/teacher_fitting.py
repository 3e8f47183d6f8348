"""Fitting a teacher on the data set's own labels, where no pretrained weights are given."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdn.captions import normalise
from sdn.data.images import to_image
from sdn.teacher import Teacher, channels_last, empty_teacher

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdn.config import TeacherConfig

MIN_IMAGES = 4
"""A class with fewer training images is not told apart by a head."""
WORDS = "words"
"""Name of the head that reads caption words, used where a data set has no labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What a teacher is fitted to tell: one head a label, or the words of the captions."""

    classes: dict[str, tuple[str, ...]]
    """Head name -> class names."""
    values: dict[str, Tensor]
    """Head name -> (N,) int64 class, -100 for none; for words (N, classes) float32 of 0 and 1."""


def targets_of(labels: Sequence[dict[str, str]], captions: Sequence[tuple[str, ...]]) -> Targets:
    """The heads that these training samples support.

    Raises:
        ValueError: neither a label nor a word occurs on `MIN_IMAGES` images.
    """
    classes, values = {}, {}
    for head in sorted({name for found in labels for name in found}):
        counts = Counter(found[head] for found in labels if head in found)
        names = tuple(sorted(name for name, n in counts.items() if n >= MIN_IMAGES))
        if len(names) > 1:
            number = {name: i for i, name in enumerate(names)}
            classes[head] = names
            values[head] = torch.tensor([number.get(found.get(head, ""), -100) for found in labels])
    if not classes:
        words = [set(" ".join(map(normalise, found)).split()) for found in captions]
        counts = Counter(word for found in words for word in found)
        names = tuple(sorted(w for w, n in counts.items() if MIN_IMAGES <= n < len(words)))
        if not names:
            raise ValueError(
                f"nothing to fit a teacher on: no label and no caption word occurs on at least "
                f"{MIN_IMAGES} of the {len(labels)} training images (and not on all of them); "
                "add images or set teacher.weights to pretrained weights"
            )
        classes[WORDS] = names
        values[WORDS] = torch.tensor([[float(w in found) for w in names] for found in words])
    return Targets(classes=classes, values=values)


class Classifier(nn.Module):
    """The teacher's network while it is fitted: batch norm after each convolution, linear heads."""

    def __init__(self, teacher: Teacher, resolution: int, heads: dict[str, int]) -> None:
        super().__init__()
        self.teacher = teacher
        self.convs, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for name, conv in teacher.convs.items():
            assert isinstance(conv, nn.Conv2d)
            fitted = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(fitted.weight, nonlinearity="relu")
            self.convs[name] = fitted
            self.norms[name] = nn.BatchNorm2d(conv.out_channels)
        side = resolution // 2 ** len(teacher.blocks)
        # A list: label names come from users' files and need not be names of modules.
        self.head_names = tuple(heads)
        self.heads = nn.ModuleList(
            nn.Linear(teacher.blocks[-1][0] * side**2, n) for n in heads.values()
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> head name -> (B, classes) logits."""
        x = image * self.teacher.factor + self.teacher.shift
        if self.teacher.convention == "release":
            x = x.flip(1)
        for name in self.teacher.names[1:]:
            if name.startswith("pool"):
                x = functional.avg_pool2d(x, 2)
            else:
                x = functional.relu(self.norms[name](self.convs[name](x)))
        x = x.flatten(1)
        return {h: linear(x) for h, linear in zip(self.head_names, self.heads, strict=True)}

    @torch.no_grad()
    def fold(self) -> Teacher:
        """The frozen teacher that computes the same taps, batch norms folded into convolutions."""
        for name, conv in self.convs.items():
            norm = self.norms[name]
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_var is not None
            assert norm.running_mean is not None
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            target = self.teacher.convs[name]
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(target, nn.Conv2d)
            assert target.bias is not None
            target.weight.copy_(conv.weight * factor.view(-1, 1, 1, 1))
            target.bias.copy_(norm.bias - norm.running_mean * factor)
        return self.teacher


def fit_teacher(
    pixels: Tensor,
    targets: Targets,
    config: TeacherConfig,
    report: Callable[[int, float], None] = lambda step, loss: None,
    *,
    bf16: bool = False,
) -> Classifier:
    """Fit the configured teacher on training images; `fold()` of the result is the teacher.

    Source: batch norm only while fitting, Ioffe & Szegedy 2015, arXiv:1502.03167.

    Args:
        pixels: (N, 3, H, W) uint8, of the training split only.
        targets: of the same N samples.
        config: see there.
        report: called with (step, loss).
        bf16: compute in bfloat16 where the processor gains by it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sizes = {head: len(names) for head, names in targets.classes.items()}
        model = Classifier(empty_teacher(config), pixels.shape[-1], sizes)
    model = channels_last(model)
    generator = torch.Generator().manual_seed(config.seed)
    batch = min(config.batch, len(pixels))
    per_epoch = len(pixels) // batch
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.rate,
        weight_decay=0.01,
        fused=True,
    )
    schedule = one_cycle(optimizer, config.rate, steps=config.epochs * per_epoch, warmup=0.2)
    model.train()
    step = 0
    for _ in range(config.epochs):
        order = torch.randperm(len(pixels), generator=generator)
        for start in range(0, per_epoch * batch, batch):
            rows = order[start : start + batch]
            image = to_image(pixels[rows]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(image)
            loss = heads_loss(logits, {h: v[rows] for h, v in targets.values.items()})
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            step += 1
            report(step, float(loss.detach()))
    model.eval()
    return model


def heads_loss(logits: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
    """Sum over heads of the mean cross entropy over the rows that have a class.

    Args:
        logits: head -> (B, classes).
        values: head -> (B,) int64, -100 for none; `words` -> (B, classes) of 0 and 1.
    """
    total = torch.zeros(())
    for head, found in logits.items():
        if values[head].is_floating_point():  # words; a label may have that name too
            total = total + functional.binary_cross_entropy_with_logits(
                found.float(), values[head]
            ) * (found.shape[1] ** 0.5)
        elif (values[head] >= 0).any():
            total = total + functional.cross_entropy(found.float(), values[head])
    return total


@torch.inference_mode()
def tap_means(teacher: Teacher, pixels: Tensor, batch: int = 64) -> dict[str, float]:
    """Mean absolute activation of each tap, `image` included, over these images.

    Args:
        teacher: frozen.
        pixels: (N, 3, H, W) uint8, of the training split.
        batch: images at a time.
    """
    sums = dict.fromkeys(teacher.names, 0.0)
    for start in range(0, len(pixels), batch):
        image = to_image(pixels[start : start + batch])
        for name, tap in teacher(image).items():
            sums[name] += float(tap.abs().mean()) * len(image)
    return {name: total / len(pixels) for name, total in sums.items()}


@torch.inference_mode()
def head_accuracy(model: Classifier, pixels: Tensor, targets: Targets) -> dict[str, float]:
    """Share of rows that each head gets right, 0..1; for `words` the share of words."""
    right: dict[str, list[Tensor]] = {head: [] for head in targets.classes}
    for start in range(0, len(pixels), 64):
        rows = slice(start, start + 64)
        for head, found in model(to_image(pixels[rows])).items():
            value = targets.values[head][rows]
            if value.is_floating_point():
                right[head].append(((found > 0) == (value > 0)).float().flatten())
            else:
                known = value >= 0
                right[head].append((found.argmax(1) == value)[known].float())
    return {head: float(torch.cat(found).mean()) for head, found in right.items()}


def one_cycle(
    optimizer: torch.optim.Optimizer, rate: float, *, steps: int, warmup: float
) -> torch.optim.lr_scheduler.OneCycleLR:
    """The rate rises to its peak for a share `warmup` of the steps, then falls to next to nothing.

    Args:
        optimizer: whose rate is set.
        rate: peak.
        steps: in all, at least 1.
        warmup: share of the steps, 0..1.
    """
    # torch divides by the length of the rise less one step, which may be exactly 0.
    if abs(warmup * steps - 1) < 1e-6:
        warmup *= 1.5
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warmup)

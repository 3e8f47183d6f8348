"""Fitting a teacher on the data set's own labels, where no pretrained weights are given.

Departs from the paper, whose teacher is VGG19 trained on ImageNet: a run needs nothing but its
data, and narrow teachers train on two cores.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdn.captions import normalise
from sdn.data.images import to_image
from sdn.fit import Fit, FitBatch, fit_batches, synced
from sdn.ranks import ALONE, Rank
from sdn.teacher import Teacher, channels_last, empty_teacher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

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


def new_teacher_fit(
    pixels: Tensor,
    targets: Targets,
    config: TeacherConfig,
    *,
    rank: Rank = ALONE,
    precision: str = "float32",
) -> Fit:
    """The fit of the configured teacher on training images, at its first step.

    Source: batch norm only while fitting, Ioffe & Szegedy 2015, arXiv:1502.03167.

    Args:
        pixels: (N, 3, H, W) uint8, of the training split only.
        targets: of the same N samples.
        config: see there.
        rank: this one; batch norm and losses are those of the global batch.
        precision: "bf16" where the device gains by it, else "float32".
    """
    model = channels_last(synced(new_classifier(targets, config, pixels.shape[-1]), rank))
    model.to(rank.device).train()
    batch = min(config.batch, len(pixels))

    def loss(network: nn.Module, taken: FitBatch) -> Tensor:
        values = {head: value[taken.rows] for head, value in targets.values.items()}
        share = len(taken.rows) * rank.world / taken.count
        shares = _label_shares(values, share, rank)
        image = to_image(pixels[taken.rows].to(rank.device, non_blocking=True))
        logits = network(image.contiguous(memory_format=torch.channels_last))
        there = {head: value.to(rank.device) for head, value in values.items()}
        return heads_loss(logits, there, shares)

    return Fit(
        "teacher",
        model,
        config,
        loss,
        steps=config.epochs * (len(pixels) // batch),
        warmup=0.2,
        decay=0.01,
        rank=rank,
        precision=precision,
    )


def new_classifier(targets: Targets, config: TeacherConfig, resolution: int) -> Classifier:
    """The untrained classifier of these targets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sizes = {head: len(names) for head, names in targets.classes.items()}
        return Classifier(empty_teacher(config), resolution, sizes)


def teacher_batches(
    keys: Sequence[str], config: TeacherConfig, start: int = 0, rank: Rank = ALONE
) -> Iterator[FitBatch]:
    """This rank's batches of the fit from step `start` on, each epoch in an order of its own."""

    def orders() -> Iterator[tuple[Tensor, Callable[[], list[int]]]]:
        generator = torch.Generator().manual_seed(config.seed)
        while True:
            yield torch.randperm(len(keys), generator=generator), list

    return fit_batches(
        keys,
        orders(),
        batch=min(config.batch, len(keys)),
        epochs=config.epochs,
        start=start,
        rank=rank,
    )


def fit_teacher(
    pixels: Tensor,
    targets: Targets,
    config: TeacherConfig,
    report: Callable[[int, float], None] = lambda step, loss: None,
    *,
    precision: str = "float32",
) -> Classifier:
    """The whole fit on one rank; `fold()` of the result is the teacher.

    Args:
        pixels, targets, config, precision: see `new_teacher_fit`.
        report: called with (step, loss).
    """
    fit = new_teacher_fit(pixels, targets, config, precision=precision)
    for batch in teacher_batches([""] * len(pixels), config):
        terms, _ = fit.advance(batch)
        report(fit.step, float(terms["fit"]))
    assert isinstance(fit.network, Classifier)
    fit.network.eval()
    return fit.network


def _label_shares(values: dict[str, Tensor], share: float, rank: Rank) -> dict[str, float]:
    """For each head, labelled rows here times ranks over those of the global batch."""
    heads = [head for head, value in values.items() if not value.is_floating_point()]
    counts = torch.tensor([float((values[head] >= 0).sum()) for head in heads])
    everywhere = rank.mean(counts) if heads else counts
    shares = (counts / everywhere.clamp(min=1e-9)).tolist()
    return dict.fromkeys(values, share) | dict(zip(heads, shares, strict=True))


def heads_loss(
    logits: dict[str, Tensor],
    values: dict[str, Tensor],
    shares: Mapping[str, float] | None = None,
) -> Tensor:
    """Sum over heads of the mean cross entropy over the rows that have a class.

    Args:
        logits: head -> (B, classes).
        values: head -> (B,) int64, -100 for none; `words` -> (B, classes) of 0 and 1.
        shares: head -> factor that makes the mean over the ranks that of the global batch.
    """
    total = torch.zeros((), device=next(iter(logits.values())).device)
    for head, found in logits.items():
        share = 1.0 if shares is None else shares[head]
        if values[head].is_floating_point():  # words; a label may have that name too
            total = total + share * functional.binary_cross_entropy_with_logits(
                found.float(), values[head]
            ) * (found.shape[1] ** 0.5)
        elif (values[head] >= 0).any():
            total = total + share * functional.cross_entropy(found.float(), values[head])
        else:  # of no weight, but ranks wait for the gradient of every head
            total = total + 0.0 * found.float().sum()
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

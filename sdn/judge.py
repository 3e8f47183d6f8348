"""The judge: a joint embedding of captions and images that only evaluation reads.

No generator is ever conditioned on it, and it shares nothing with the caption encoder that the
student reads: words and pieces of words in a bag instead of characters in a row, and images in the
feature network of the evaluation.
"""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdn.captions import contrastive_loss, normalise
from sdn.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sdn.config import JudgeConfig

BUCKETS = 1 << 13
"""Into which words, pairs of words and pieces of four letters are hashed."""


def tokens(caption: str) -> list[int]:
    """Buckets of a caption's words, pairs of neighbouring words and pieces of four letters."""
    words = normalise(caption).split()
    found = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    found += [f"_{word}_"[i : i + 4] for word in words for i in range(max(1, len(word) - 1))]
    return [zlib.crc32(token.encode()) % BUCKETS for token in found] or [0]


class Judge(nn.Module):
    """Captions and image features as unit vectors whose cosine says how well they fit."""

    def __init__(self, *, features: int, dim: int) -> None:
        """Args:
        features: F, of the feature network.
        dim: E, of the joint embedding.
        """
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.config = {"features": features, "dim": dim}
        self.words = nn.EmbeddingBag(BUCKETS, dim, mode="mean")
        self.text = nn.Linear(dim, dim)
        self.image = nn.Linear(features, dim)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def of_captions(self, captions: Sequence[str]) -> Tensor:
        """(B, E) float32, rows of unit length."""
        bags = [tokens(caption) for caption in captions]
        offsets = torch.tensor([0, *map(len, bags)]).cumsum(0)[:-1]
        flat = torch.tensor([token for bag in bags for token in bag])
        words = functional.normalize(self.words(flat, offsets), dim=1)
        return functional.normalize(words + self.text(words), dim=1)

    def of_features(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, E) float32, rows of unit length."""
        return functional.normalize(self.image((features - self.mean) * self.scale), dim=1)


def fit_judge(
    captions: Sequence[tuple[str, ...]],
    features: Tensor,
    held_captions: Sequence[tuple[str, ...]],
    held_features: Tensor,
    config: JudgeConfig,
    report: Callable[[float, str], None] = lambda share, text: None,
) -> tuple[Judge, float]:
    """A judge fitted on real training images, kept from the epoch that held-out images like best.

    Args:
        captions: of N training images, at least one each; one is drawn anew each epoch.
        features: (N, F), their features.
        held_captions, held_features: of validation images; none keeps the last epoch.
        config: see there.
        report: called with (share done, text).

    Returns:
        The judge, frozen, and the mean reciprocal rank of the own caption of a held-out image among
        those of all held-out images; NaN without any.

    Raises:
        ValueError: fewer than two training images.
    """
    if len(captions) < 2:
        raise ValueError(f"the judge needs at least 2 training images, not {len(captions)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        judge = Judge(features=features.shape[1], dim=config.dim)
        judge.mean.copy_(features.mean(0))
        deviation = features.std(0)
        # What never varied says nothing, however far a drawn image is from it.
        judge.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation, 0))
        groups: list[dict[str, Any]] = [
            {"params": judge.words.parameters(), "weight_decay": 0.0},
            {"params": [*judge.text.parameters(), *judge.image.parameters()]},
        ]
        optimizer = torch.optim.AdamW(groups, lr=config.rate, weight_decay=config.decay, fused=True)
        batch = min(config.batch, len(captions))
        best, kept = -1.0, judge.state_dict()
        for epoch in range(config.epochs):
            order = torch.randperm(len(captions))
            for start in range(0, len(order) - batch + 1, batch):
                rows = order[start : start + batch].tolist()
                drawn = torch.randint(1 << 30, (batch,)).tolist()
                texts = [
                    captions[r][d % len(captions[r])] for r, d in zip(rows, drawn, strict=True)
                ]
                noise = config.noise * deviation * torch.randn(batch, features.shape[1])
                loss = contrastive_loss(
                    judge.of_captions(texts),
                    judge.of_features(features[rows] + noise),
                    config.temperature,
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            found = held_out_score(judge, held_captions, held_features)
            if not found <= best:  # NaN, without held-out images, keeps the newest
                best = found
                kept = {name: value.clone() for name, value in judge.state_dict().items()}
            held = f", held out {found:.3f}" if held_captions else ""
            report((epoch + 1) / config.epochs, f"loss {loss.item():.3f}{held}")
    judge.load_state_dict(kept)
    return judge.requires_grad_(requires_grad=False).eval(), best


@torch.no_grad()
def held_out_score(judge: Judge, captions: Sequence[tuple[str, ...]], features: Tensor) -> float:
    """Mean reciprocal rank of each image's own first caption among all of them; NaN for none."""
    if not captions:
        return float("nan")
    scores = judge.of_features(features) @ judge.of_captions([c[0] for c in captions]).T
    ranks = 1 + (scores > scores.diagonal().unsqueeze(1)).sum(1)
    return float((1 / ranks.double()).mean())


def save_judge(judge: Judge, path: Path) -> None:
    """Write a judge with what is needed to build it again."""
    write_tensors(path, judge.state_dict(), judge.config)


def open_judge(path: Path) -> Judge:
    """The frozen judge written by `save_judge`.

    Raises:
        FileNotFoundError, ValueError: there is none, or a damaged one.
    """
    tensors, settings = read_tensors(path)
    judge = Judge(**settings)
    judge.load_state_dict(tensors)
    return judge.requires_grad_(requires_grad=False).eval()

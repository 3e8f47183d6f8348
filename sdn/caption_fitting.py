"""Fitting the caption encoder against teacher features, before it is frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdn.captions import (
    CharCnnRnn,
    SentenceEncoder,
    characters,
    contrastive_loss,
    evening,
    joint_embedding_loss,
    new_encoder,
    normalise,
)
from sdn.teacher_fitting import one_cycle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdn.config import CaptionConfig

SIBLINGS = 8
"""Captions next to each other in the alphabet that share a batch."""

LOSSES = {"joint-embedding": joint_embedding_loss, "contrastive": contrastive_loss}


def fit_captions(
    captions: Sequence[tuple[str, ...]],
    features: Tensor,
    config: CaptionConfig,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> CharCnnRnn | SentenceEncoder:
    """A frozen caption encoder whose embeddings tell apart what the teacher tells apart.

    The text embedding and a linear reading of the teacher's features of the same image meet in the
    joint embedding loss; that linear reading is dropped afterwards. Embeddings are then evened out
    over the training captions.
    Source: Reed et al. 2016, arXiv:1605.05395.

    Args:
        captions: of each training image, at least one; one is drawn anew each epoch.
        features: (N, F), the teacher's features of the same images.
        config: see there. The sentence encoder is only evened out.
        report: called with (step, loss).

    Raises:
        ValueError: fewer images than a batch of two.
    """
    encoder = new_encoder(config)
    if len(captions) < 2:
        raise ValueError(f"fitting captions needs at least 2 training images, not {len(captions)}")
    if isinstance(encoder, CharCnnRnn):
        _fit(encoder, captions, features, config, report)
    encoder.requires_grad_(requires_grad=False).eval()
    first = [found[0] for found in captions]
    embedded = torch.cat([encoder.encode(first[i : i + 256]) for i in range(0, len(first), 256)])
    encoder.even_out(*evening(embedded))
    return encoder


def _fit(
    encoder: CharCnnRnn,
    captions: Sequence[tuple[str, ...]],
    features: Tensor,
    config: CaptionConfig,
    report: Callable[[int, float], None],
) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-4)
    reading = nn.Linear(features.shape[1], config.dim)
    nn.init.normal_(reading.weight, 0, features.shape[1] ** -0.5, generator=generator)
    nn.init.zeros_(reading.bias)
    parameters = [*encoder.parameters(), *reading.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.rate, weight_decay=1e-4, fused=True)
    batch = min(config.batch, len(captions))
    per_epoch = len(captions) // batch
    schedule = one_cycle(optimizer, config.rate, steps=config.epochs * per_epoch, warmup=0.1)
    loss_of = LOSSES[config.loss]
    names = [normalise(found[0]) for found in captions]
    alphabetical = torch.tensor(sorted(range(len(names)), key=names.__getitem__))
    step = 0
    for _ in range(config.epochs):
        order = _siblings_together(alphabetical, generator)
        for start in range(0, per_epoch * batch, batch):
            rows = order[start : start + batch].tolist()
            draws = torch.randint(1 << 30, (batch,), generator=generator).tolist()
            chosen = [captions[i][d % len(captions[i])] for i, d in zip(rows, draws, strict=True)]
            text = encoder(characters(chosen, config.max_chars))
            loss = loss_of(text, reading(features[rows]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
            step += 1
            report(step, float(loss.detach()))


def _siblings_together(alphabetical: Tensor, generator: torch.Generator) -> Tensor:
    """The rows in an order for one epoch: runs of `SIBLINGS` neighbours, the runs shuffled.

    Departs from the paper: captions that differ in one word ("cook: dark skin tone", "cook: light
    skin tone") seldom meet in a batch drawn evenly, and are the ones that must be told apart.
    """
    shift = int(torch.randint(len(alphabetical), (1,), generator=generator))
    runs = torch.split(alphabetical.roll(shift), SIBLINGS)
    return torch.cat([runs[i] for i in torch.randperm(len(runs), generator=generator).tolist()])

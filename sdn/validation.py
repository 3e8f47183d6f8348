"""What trials are ranked on: how well a student draws the validation captions.

Neither score changes its meaning with the loss weights, and the test split is not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sdn.captions import open_encoder
from sdn.data.loader import load_split, split_blocks
from sdn.evaluation import synthesizer_of
from sdn.features.networks import open_network
from sdn.features.rows import HeldRows
from sdn.metrics import first_alike, pixel_features
from sdn.reference import open_reference
from sdn.sampling import ENCODER
from sdn.scores.kernel import kid
from sdn.scores.paired import Paired, paired_kid, paired_shares
from sdn.scores.retrieval import retrieval_scores, true_image_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from sdn.config import RunConfig
    from sdn.scores.score import Score
    from sdn.stage_run import StageInputs

_BATCH = 64
_LEAST = 3
"""Images below which there is no KID and no gain."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a student stands: its score, and each caption's part in it."""

    score: Score
    """KID (best 0) or mean reciprocal rank of the true image (best 1), as the search asks."""
    parts: Tensor
    """(N, F) float32: what two students are compared by, caption by caption. For KID features of
    the images, for retrieval (N, 1) reciprocal ranks."""


class Validation:
    """Scores students on validation captions, by KID or by retrieval of the true image."""

    def __init__(self, config: RunConfig, inputs: StageInputs, reference: Path) -> None:
        """Args:
        config: of the run; `config.search` says which score, and of how many captions.
        inputs: data set, teacher and caption encoder.
        reference: folder of the reference: real images in the feature network.

        Raises:
            ValueError: no validation split, or one of fewer images than a gain can be told by.
        """
        self.config, self.kind = config, config.search.score
        self._encoder = open_encoder(inputs.captions / ENCODER)
        most = config.search.captions
        blocks = split_blocks(inputs.data, "validation", most=most)
        self.captions = [found[0] for block in blocks for found in block.captions]
        if len(self.captions) < _LEAST:
            raise ValueError(
                f"the data set has {len(self.captions)} validation images, and ranking students "
                f"needs at least {_LEAST}: raise data.validation_share"
            )
        if self.kind == "kid":
            self._network = open_network(config.evaluation, inputs.teacher)
            held = open_reference(reference)
            count = held.about["images"].get("validation", 0)
            self._real = HeldRows(held.rows("validation").read(0, count))
        else:
            # Compared at 32x32; of images that are equal pixel by pixel the first one counts.
            splits = [load_split(inputs.data, name) for name in ("validation", "train")]
            pixels = torch.cat([split.pixels for split in splits])
            same = first_alike(pixels)
            self._gallery = HeldRows(pixel_features(pixels))
            self._truth = same[torch.arange(len(self.captions))]
            self._first = same == torch.arange(len(same))

    def __call__(self, weights: Mapping[str, Tensor]) -> Standing:
        """How the student with these weights, on the CPU, stands."""
        model = synthesizer_of(self.config, self._encoder, dict(weights))
        starts = range(0, len(self.captions), _BATCH)
        drawn = (model.of_data(self.captions[start : start + _BATCH]) for start in starts)
        if self.kind == "kid":
            parts = torch.cat([self._network(block)[0] for block in drawn])
            return Standing(score=kid(self._real, HeldRows(parts)), parts=parts)
        queries = HeldRows(torch.cat([pixel_features(block) for block in drawn]))
        ranks = true_image_ranks(queries, self._gallery, self._truth, self._first)
        score = retrieval_scores(ranks)["reciprocal_rank_score"]
        return Standing(score=score, parts=(1 / ranks.float()).unsqueeze(1))

    def gain(self, own: Tensor, other: Tensor) -> Paired:
        """By how much the student with `other` parts is better than the one with `own`."""
        if self.kind == "kid":
            return paired_kid(self._real, HeldRows(own), HeldRows(other))
        return paired_shares(own.squeeze(1), other.squeeze(1))


def pack_parts(parts: Tensor) -> bytes:
    """(N, F) float32 as bytes: F, then the rows."""
    rows = np.ascontiguousarray(parts.float().numpy())
    return np.int64(rows.shape[1]).tobytes() + rows.tobytes()


def unpack_parts(data: bytes) -> Tensor:
    """What `pack_parts` was given.

    Raises:
        ValueError: the bytes do not hold whole rows.
    """
    dim = int(np.frombuffer(data[:8], np.int64)[0]) if len(data) >= 8 else 0
    if dim < 1 or len(data) == 8 or (len(data) - 8) % (4 * dim):
        raise ValueError(f"{len(data)} bytes are no whole rows of {dim} numbers")
    return torch.from_numpy(np.frombuffer(data[8:], np.float32).reshape(-1, dim).copy())

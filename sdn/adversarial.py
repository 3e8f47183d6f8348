"""Stage three: critics on the teacher's taps teach the student beside the distances.

Departs from the paper, which ends with stage two: a distance to one real image has a blur for its
best answer, and no use for noise.
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sdn.augmenting import augmented, change_of
from sdn.captions import normalise
from sdn.clamping import clamped
from sdn.critics import Critics, hinge
from sdn.data.images import to_image
from sdn.losses import tap_losses, wanted_taps
from sdn.ranks import ALONE, Rank
from sdn.trainer import Trainer, rate_at, step_names
from sdn.training import copied

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdn.checkpoint import Checkpoint
    from sdn.config import AdversarialConfig
    from sdn.data.records import Batch
    from sdn.student import Student, Taps
    from sdn.teacher import Teacher

_LEAST_DISTANCE = 1e-3
"""Of two synthetic images, so that equal ones do not divide by 0; in units of their range."""


class AdversarialTrainer(Trainer):
    """Stage three on one rank: in each step first the critics move, then the student.

    Loss of the critics, a tap l and a caption t with its image x, another caption t' and noise z:
    hinge(D_l(T_l(x), t), real) + hinge(D_l(T_l(S(t, z)), t), false) / 2
    + hinge(D_l(T_l(x), t'), false) / 2, the last left out where a global batch has one caption;
    summed over l by the critics' weights as shares of their sum.
    Loss of the student: sum over l of w_l * d(T_l(x), T_l(S(t, z))), the terms of stage two, and
    -a * D_l(T_l(S(t, z)), t), each critic by its share, and with `diversity` what `_alike` says.
    S(t, z) is clamped, see `sdn.clamping`.
    Source: Sauer et al. 2021, arXiv:2111.01007 (critics on a frozen network's features); Reed et
    al. 2016, arXiv:1605.05396 (mismatched captions).
    """

    config: AdversarialConfig
    beside = frozenset({"critics"})

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        config: AdversarialConfig,
        *,
        steps: int,
        tap_means: Mapping[str, float],
        precision: str,
        rank: Rank = ALONE,
    ) -> None:
        """Arguments as of `Trainer`.

        Raises:
            ValueError: a critic of a tap that the teacher lacks.
        """
        super().__init__(
            "stage_three",
            student,
            teacher,
            config,
            steps=steps,
            tap_means=tap_means,
            precision=precision,
            rank=rank,
        )
        side = student.top[1] * 2 ** len(student.blocks)
        self.critics = Critics(
            teacher.blocks,
            config.critics,
            tap_means=tap_means,
            resolution=side,
            text_dim=student.text_dim,
            width=config.critic_width,
            seed=config.seed,
        ).to(self.device)
        share = 1 / sum(self.critics.weights.values())
        self._shares = {name: weight * share for name, weight in self.critics.weights.items()}
        self._rank, self._wrapped = rank, rank.wrap(self.critics)
        self.critic_optimizer = torch.optim.Adam(
            [p for p in self.critics.parameters() if p.requires_grad],
            lr=config.critic_rate,
            betas=(0.0, 0.99),
            fused=True,
        )
        distilled = wanted_taps(teacher.names, config.weights)
        self._distilled = distilled
        self._read = tuple(n for n in teacher.names if n in {*distilled, *self.critics.weights})

    def advance(self, batch: Batch, text: Tensor, images: int) -> tuple[dict[str, Tensor], Tensor]:
        """One step of the critics and one of the student; see `Trainer.advance`.

        The terms are the student's, and `critics`, which the student's gradient has no part in.
        """
        self.rate = rate_at(self.step, self.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        for group in self.critic_optimizer.param_groups:
            group["lr"] = self.config.critic_rate * self.rate / self.config.rate
        other = self._mismatched(batch, text)
        text = text.to(self.device)
        image = to_image(batch.pixels.to(self.device, non_blocking=True))
        image = image.contiguous(memory_format=torch.channels_last)
        code = self.coded(batch, text)
        with self._precise():
            made = clamped(self.forward(code, ("image",))["image"])
            seen = self._changed(batch, made)
            with torch.no_grad():
                real = self.teacher(self._changed(batch, image), self._read)
            synthetic = self.teacher(seen, self._read)
        terms = {"critics": self._teach_critics(real, synthetic, text, other, batch.weight)}
        distances = {name: real[name] for name in self._distilled}
        terms |= tap_losses(
            synthetic, distances, self.config.weights, self.scales, self.config.distance
        )
        terms["adversary"] = -self.config.adversary * self._judged(synthetic, text)
        if self.config.diversity > 0:
            terms["diversity"] = self.config.diversity * self._alike(batch, text, code, made)
        wanted = torch.stack([term for name, term in terms.items() if name != "critics"]).sum()
        self.optimizer.zero_grad()
        (wanted * batch.weight).backward()  # type: ignore[no-untyped-call]
        shares = {name: term.detach() * batch.weight for name, term in terms.items()}
        return shares, self._move(images)

    def _changed(self, batch: Batch, image: Tensor) -> Tensor:
        """The images as critics see them; a sample's real and synthetic one in the same way."""
        if self.config.augment == "none":
            return image
        change = change_of(step_names(batch), seed=self.config.seed)
        return augmented(image, change).contiguous(memory_format=torch.channels_last)

    def _teach_critics(
        self, real: Taps, synthetic: Taps, text: Tensor, other: Tensor | None, weight: float
    ) -> Tensor:
        """One step of the critics; their loss."""
        # In one pass: what is distributed waits for the gradient of each of its passes.
        images = [real, synthetic] if other is None else [real, synthetic, real]
        texts = [text, text] if other is None else [text, text, other]
        taps = {
            name: torch.cat([one[name].detach() for one in images]) for name in self.critics.weights
        }
        with self._precise():
            judged = self._wrapped(taps, torch.cat(texts))
        total = torch.zeros((), device=self.device)
        for name, found in judged.items():
            true, *wrong = found.split(len(text))
            loss = hinge(true, real=True) + sum(hinge(one, real=False) for one in wrong) / 2
            total = total + self._shares[name] * loss
        self.critic_optimizer.zero_grad()
        (total * weight).backward()  # type: ignore[no-untyped-call]
        self.critic_optimizer.step()
        return total.detach()

    def _mismatched(self, batch: Batch, text: Tensor) -> Tensor | None:
        """For each row a caption of the global batch that differs from its own.

        The next in an order drawn anew each step, the same on any number of ranks.

        Args:
            batch: this rank's share.
            text: (B, D), embeddings of its captions.

        Returns:
            (B, D), on the device; None if the global batch has one caption only.
        """
        # By the text: of one caption's embedding the last bits may differ from rank to rank.
        own = torch.tensor([_id_of(caption) for caption in batch.captions])
        ids = torch.zeros(self.config.global_batch, dtype=torch.int64)
        rows = torch.zeros(self.config.global_batch, text.shape[1])
        count = len(batch.keys)  # those of a padded batch are of no global batch
        ids[:count], rows[:count] = own[:count], text[:count]
        ids, rows = self._rank.together(ids).flatten(), self._rank.together(rows).flatten(0, 1)
        ids, rows = torch.cat([ids[ids != 0], own]), torch.cat([rows[ids != 0], text.cpu()])
        generator = torch.Generator().manual_seed(batch.step)
        factor = 2 * torch.randint(1 << 62, (), generator=generator) + 1  # odd: ids stay different
        known, place = torch.unique(ids * factor, return_inverse=True)
        if len(known) == 1:
            return None
        following = (place[-len(text) :] + 1) % len(known)
        return rows[(place == following.unsqueeze(1)).int().argmax(1)].to(self.device)

    def _judged(self, synthetic: Taps, text: Tensor) -> Tensor:
        """Mean judgement of the synthetic images by the critics as they are now."""
        wanting = [p for p in self.critics.parameters() if p.requires_grad]
        for parameter in wanting:
            parameter.requires_grad_(False)
        with self._precise():
            found = self.critics(synthetic, text)
        for parameter in wanting:
            parameter.requires_grad_(True)
        means = [self._shares[name] * judged.mean() for name, judged in found.items()]
        return torch.stack(means).sum()

    def _alike(self, batch: Batch, text: Tensor, code: Tensor, made: Tensor) -> Tensor:
        """How much alike two images of a caption are, for the distance of their noise.

        Formula: mean |z1 - z2| / (mean |S(t, z1) - S(t, z2)| + 1e-3)
        Source: Mao et al. 2019, arXiv:1903.05628.
        """
        other = self.coded(batch, text, of="other/")
        with self._precise():
            image = clamped(self.student(other, ("image",))["image"])
        apart = (code - other).abs().sum(1) / self.student.noise
        distance = (image - made).abs().mean((1, 2, 3))
        found: Tensor = (apart / (distance + _LEAST_DISTANCE)).mean()
        return found

    def checkpoint(self) -> Checkpoint:
        """All state, that of the critics too."""
        critics = {
            "weights": copied(self.critics.state_dict()),
            "optimizer": copied(self.critic_optimizer.state_dict()),
        }
        return dataclasses.replace(super().checkpoint(), critics=critics)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was taken."""
        super().restore(checkpoint)
        critics = cast("dict[str, Any]", checkpoint.critics)
        self.critics.load_state_dict(critics["weights"])
        self.critic_optimizer.load_state_dict(critics["optimizer"])


@lru_cache(maxsize=100_000)
def _id_of(caption: str) -> int:
    """A number for a caption as encoders read it; not 0. Remembered: each comes many times."""
    digest = hashlib.sha256(normalise(caption).encode()).digest()
    return int.from_bytes(digest[:7], "little") + 1

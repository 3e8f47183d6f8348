"""Stage three: critics on the teacher's taps teach the student beside the distances.

Departs from the paper, which ends with stage two: a distance to one real image has a blur for its
best answer, and no use for noise.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sdn.augmenting import augmented, change_of
from sdn.critics import Critics, hinge
from sdn.data.images import to_image
from sdn.gathering import of_all_ranks
from sdn.losses import tap_losses, wanted_taps
from sdn.matching import Vectors, match_loss
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
    + hinge(D_l(T_l(x), t'), false) / 2.
    Loss of the student: sum over l of w_l * d(T_l(x), T_l(S(t, z))), the terms of stage two, and
    -a * D_l(T_l(S(t, z)), t), each critic by its weight.
    With a matcher also how well images fit their captions beside others (`match_loss`): the real
    ones among the critics' losses, the synthetic ones, weighed, among the student's.
    Source: Sauer et al. 2021, arXiv:2111.01007 (critics on a frozen network's features); Reed et
    al. 2016, arXiv:1605.05396 (mismatched captions).
    """

    config: AdversarialConfig

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
            matching=config.match > 0,
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
        text = text.to(self.device)
        image = to_image(batch.pixels.to(self.device, non_blocking=True))
        image = image.contiguous(memory_format=torch.channels_last)
        code = self.coded(batch, text)
        with self._precise():
            made = self.forward(code, ("image",))["image"]
            seen = self._changed(batch, made)
            with torch.no_grad():
                real = self.teacher(self._changed(batch, image), self._read)
            synthetic = self.teacher(seen, self._read)
        terms = {"critics": self._teach_critics(batch, real, synthetic, text)}
        distances = {name: real[name] for name in self._distilled}
        terms |= tap_losses(
            synthetic, distances, self.config.weights, self.scales, self.config.distance
        )
        terms |= self._judged(batch, synthetic, text)
        if self.config.diversity > 0:
            terms["diversity"] = self.config.diversity * self._alike(batch, text, code, made)
        wanted = torch.stack([term for name, term in terms.items() if name != "critics"]).sum()
        self.optimizer.zero_grad()
        (wanted * batch.weight).backward()  # type: ignore[no-untyped-call]
        if self.critics.matcher is not None:
            # In their own order, for that of the rows is another one on other ranks.
            self.critics.matcher.remember(torch.unique(self._of_all(batch, text), dim=0))
        shares = {name: term.detach() * batch.weight for name, term in terms.items()}
        return shares, self._move(images)

    def _changed(self, batch: Batch, image: Tensor) -> Tensor:
        """The images as critics see them; a sample's real and synthetic one in the same way."""
        if self.config.augment == "none":
            return image
        change = change_of(step_names(batch), seed=self.config.seed)
        return augmented(image, change).contiguous(memory_format=torch.channels_last)

    def _teach_critics(self, batch: Batch, real: Taps, synthetic: Taps, text: Tensor) -> Tensor:
        """One step of the critics; their loss."""
        # In one pass: what is distributed waits for the gradient of each of its passes.
        count = len(text)
        taps = {
            name: torch.cat([real[name], real[name], synthetic[name].detach()])
            for name in self.critics.weights
        }
        other = self._other(batch, text)
        with self._precise():
            judged = self._wrapped(taps, torch.cat([text, text if other is None else other, text]))
        total = torch.zeros((), device=self.device)
        if judged.vectors is not None:
            images, words, others = judged.vectors
            vectors = Vectors(images[:count], words[:count], others)  # of the real images
            total = total + self._matched(batch, vectors, text)
        for name, found in judged.places.items():
            true, mismatched, false = found.split(count)
            loss = hinge(true, real=True) + hinge(false, real=False) / 2
            if other is not None:
                loss = loss + hinge(mismatched, real=False) / 2
            total = total + self._shares[name] * loss
        self.critic_optimizer.zero_grad()
        (total * batch.weight).backward()  # type: ignore[no-untyped-call]
        self.critic_optimizer.step()
        return total.detach()

    def _other(self, batch: Batch, text: Tensor) -> Tensor | None:
        """(B, D): for each row another caption of the global batch; None where all are equal.

        Each is followed by the next different one in an order that each step draws anew, and that
        is the same on any number of ranks.
        """
        every = torch.cat([self._of_all(batch, text), text])
        generator = torch.Generator().manual_seed(batch.step)
        factors = torch.randint(1 << 62, (text.shape[1],), generator=generator)
        # Of the bits, for a sum of floats could be another on another rank; + 0 as -0 has its own.
        bits = (every + 0.0).view(torch.int32).long()
        known, place = torch.unique((bits * factors.to(bits.device)).sum(1), return_inverse=True)
        if len(known) == 1:
            return None
        following = (place[-len(text) :] + 1) % len(known)
        return every[(place == following.unsqueeze(1)).int().argmax(1)]

    def _matched(self, batch: Batch, vectors: Vectors, text: Tensor) -> Tensor:
        """How badly images and captions of the global batch match.

        Each rank has the whole loss; as the weights of a step are 1 on the mean over the ranks, so
        has their mean.
        """
        assert self.critics.matcher is not None
        images, words, own = (
            self._of_all(batch, rows) for rows in (vectors.images, vectors.words, text)
        )
        every = torch.cat([own, self.critics.matcher.known()])
        same = (own.unsqueeze(1) == every).all(2)
        same.diagonal().fill_(value=False)
        return match_loss(images, words, vectors.others, same)

    def _of_all(self, batch: Batch, rows: Tensor) -> Tensor:
        return of_all_ranks(rows, len(batch.keys), self.config.global_batch, self._rank)

    def _judged(self, batch: Batch, synthetic: Taps, text: Tensor) -> dict[str, Tensor]:
        """The student's terms of what the critics, as they are now, say of its images."""
        wanting = [p for p in self.critics.parameters() if p.requires_grad]
        for parameter in wanting:
            parameter.requires_grad_(False)
        with self._precise():
            found = self.critics(synthetic, text)
        for parameter in wanting:
            parameter.requires_grad_(True)
        means = [self._shares[name] * judged.mean() for name, judged in found.places.items()]
        terms = {"adversary": -self.config.adversary * torch.stack(means).sum()}
        if found.vectors is not None:
            terms["match"] = self.config.match * self._matched(batch, found.vectors, text)
        return terms

    def _alike(self, batch: Batch, text: Tensor, code: Tensor, made: Tensor) -> Tensor:
        """How much alike two images of a caption are, for the distance of their noise.

        Formula: mean |z1 - z2| / mean |S(t, z1) - S(t, z2)|
        Source: Mao et al. 2019, arXiv:1903.05628.
        """
        other = self.coded(batch, text, of="other/")
        with self._precise():
            image: Tensor = self.student(other, ("image",))["image"]
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

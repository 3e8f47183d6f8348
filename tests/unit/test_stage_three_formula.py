"""Stage three against its formulas written out: both losses, and the gradient of each."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_adversarial import inputs, trainer_of  # noqa: F401 (a fixture)
from test_training import batch_of

import sdn.adversarial
from sdn.adversarial import AdversarialTrainer
from sdn.data.images import to_image
from sdn.trainer import rate_at

TERMS = {
    "critics alone": {},
    "all": {"diversity": 0.3},
    "squared": {"distance": "l2"},
    "augmented": {"augment": "differentiable"},
}
CRITICS = {"pool2": 3.0, "pool4": 1.0}
ADVERSARY = 5.0


def texts_of(step, count=3):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(step))


def clamped(image):
    """In range, with no gradient from out of it but from far out where that leads back."""
    found = image + (image.clamp(-1, 1) - image).detach()
    size = image.detach().abs()
    kinds = set()

    def led_back(gradient):
        back = image.detach() * gradient > 0
        near, far = (size > 1) & (size < 1.25), size >= 1.25
        kinds.update(
            name
            for name, where in (("near", near), ("back", far & back), ("out", far & ~back))
            if where.any()
        )
        return gradient * ((size <= 1) | (far & back))

    found.register_hook(led_back)
    return found, kinds


def literal_step(trainer, batch, text, other):
    """Terms of one step of a copy of a trainer, the student's gradient, and what was out of range.

    Spectral norm moves with each pass, so passes are made as they are in training.
    """
    config, critics, teacher = trainer.config, trainer.critics, trainer.teacher
    code = trainer.coded(batch, text)
    made, kinds = clamped(trainer.student(code)["image"])
    seen = [trainer._changed(batch, one) for one in (to_image(batch.pixels), made)]
    with torch.no_grad():
        real = teacher(seen[0])
    synthetic = teacher(seen[1])
    weight = {"pool2": 0.75, "pool4": 0.25}

    parts = [(real, text, 1, 1), (synthetic, text, -1, 0.5)]
    parts += [(real, other, -1, 0.5)] * (other is not None)
    judged = critics(
        {n: torch.cat([taps[n].detach() for taps, *_ in parts]) for n in weight},
        torch.cat([words for _, words, *_ in parts]),
    )
    loss = 0
    for name, share in weight.items():
        for rows, (_, _, sign, factor) in zip(judged[name].split(len(text)), parts, strict=True):
            loss = loss + share * factor * (1 - sign * rows).clamp(min=0).mean()
    terms = {"critics": loss}
    for group in trainer.critic_optimizer.param_groups:
        group["lr"] = (
            config.critic_rate * rate_at(trainer.step, trainer.steps, config) / config.rate
        )
    trainer.critic_optimizer.zero_grad()
    loss.backward()
    trainer.critic_optimizer.step()

    for name in teacher.names:
        away = synthetic[name] - real[name]
        scale = config.weights.of(name) * trainer.scales[name]
        squared = config.distance == "l2"
        terms[name] = (
            scale * trainer.scales[name] * away**2 if squared else scale * away.abs()
        ).mean()
    judged = critics(synthetic, text)
    terms["adversary"] = -ADVERSARY * sum(
        share * judged[name].mean() for name, share in weight.items()
    )
    if config.diversity:
        second = trainer.coded(batch, text, of="other/")
        images, _ = clamped(trainer.student(second)["image"])
        noise = (code - second)[:, 8:].abs().mean(1)
        terms["diversity"] = (
            config.diversity * (noise / ((made - images).abs().mean((1, 2, 3)) + 1e-3)).mean()
        )
    student = [*trainer.student.parameters()]
    total = sum(term for name, term in terms.items() if name != "critics")
    return terms, torch.autograd.grad(total, student), kinds


@pytest.mark.parametrize("changes", TERMS.values(), ids=list(TERMS))
def test_terms_and_gradient_are_those_of_the_formula(inputs, changes, monkeypatch):  # noqa: F811
    """In three steps one after another, the last of one caption alone: with moved critics."""
    others = []
    drawn = AdversarialTrainer._mismatched

    def noted(self, batch, text):
        others.append(drawn(self, batch, text))
        return others[-1]

    monkeypatch.setattr(AdversarialTrainer, "_mismatched", noted)
    trainer = trainer_of(inputs, adversary=ADVERSARY, critics=CRITICS, **changes)
    trainer.student.convs["image"].weight.data.mul_(3)  # values out of range, near and far
    for step in range(3):
        batch, text = batch_of(step), texts_of(step)
        if step == 2:
            batch = dataclasses.replace(batch, captions=("the same",) * 3)
        before = copy.deepcopy(trainer)
        terms, _ = trainer.advance(batch, text, 3)
        expected, gradient, kinds = literal_step(before, batch, text, others[-1])
        assert kinds == {"near", "back", "out"}
        assert terms.keys() == expected.keys()
        assert (others[-1] is None) == (step == 2)
        for name, value in expected.items():
            torch.testing.assert_close(terms[name], value.detach(), rtol=1e-4, atol=1e-6, msg=name)
        for found, wanted in zip(trainer.student.parameters(), gradient, strict=True):
            torch.testing.assert_close(found.grad, wanted, rtol=1e-3, atol=1e-6)


def test_the_critics_alone_move_the_student(inputs):  # noqa: F811
    """What they say reaches its weights through the frozen teacher."""
    trainer = trainer_of(inputs)
    batch, text = batch_of(), texts_of(0)
    made = trainer.student(trainer.coded(batch, text))["image"]
    judged = trainer._judged(trainer.teacher(made), text)
    (found,) = torch.autograd.grad(judged, trainer.student.pool.weight)
    assert found.abs().sum() > 0


def test_critics_follow_the_students_schedule(inputs):  # noqa: F811
    """Warming up, at the peak and at the end, each by its own rate."""
    trainer = trainer_of(inputs, rate=1e-3, critic_rate=4e-3, schedule="one-cycle")
    rates = []
    for step in range(10):
        trainer.advance(batch_of(step), texts_of(step), 3)
        own, critics = (
            o.param_groups[0]["lr"] for o in (trainer.optimizer, trainer.critic_optimizer)
        )
        assert critics == pytest.approx(4 * own)
        rates.append(own)
    assert max(rates) > 10 * min(rates)


def test_real_and_synthetic_are_changed_alike(inputs, monkeypatch):  # noqa: F811
    """A sample's two images get one change; another sample, or step, gets another."""
    seen = []

    def noted(image, change):
        seen.append(change)
        return image

    monkeypatch.setattr(sdn.adversarial, "augmented", noted)
    trainer = trainer_of(inputs, augment="differentiable")
    for step in range(2):
        trainer.advance(batch_of(step), texts_of(step), 3)
    first, second, third, fourth = seen
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert not torch.equal(first, third)
    assert len(torch.unique(first, dim=0)) == 3


def test_a_sample_has_other_noise_in_each_step(inputs):  # noqa: F811
    """A student that saw one image of a caption with one noise would learn them by heart."""
    trainer = trainer_of(inputs)
    text = texts_of(0)
    one, same, other = (trainer.coded(batch_of(step), text)[:, 8:] for step in (0, 0, 1))
    assert torch.equal(one, same)
    assert (one != other).all()

"""Settings of a stage arrive where they act."""

import copy

import pytest
import torch

from sdn.config import LossWeights, StageConfig
from sdn.data.records import Batch
from sdn.student import Student
from sdn.taps import blocks_of
from sdn.teacher import Teacher
from sdn.trainer import Trainer, rate_at

BLOCKS = blocks_of("vgg11", 0.04)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch(
        keys=("a", "b", "c"),
        pixels=pixels,
        captions=("a", "b", "c"),
        labels=({}, {}, {}),
        epoch=0,
        step=step,
        weight=1.0,
    )


def text(step):
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(100 + step))


def trainer_of(precision="float32", steps=6, **changes):
    teacher = Teacher(BLOCKS, "symmetric")
    generator = torch.Generator().manual_seed(0)
    for parameter in teacher.parameters():
        parameter.normal_(0, 0.2, generator=generator)
    student = Student(BLOCKS, resolution=32, text_dim=8, width=0.04, init="he")
    config = StageConfig(**{"rate": 1e-3, "scale": "raw"} | changes)
    means = dict.fromkeys(teacher.names, 0.5)
    return Trainer(
        "stage_two", student, teacher, config, steps=steps, tap_means=means, precision=precision
    )


@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_steps_are_adams(beta2, schedule):
    """Weights after six steps are those of Adam written out, with the rate and decay configured."""
    trainer = trainer_of(beta2=beta2, schedule=schedule)
    names = [name for name, _ in trainer.student.named_parameters()]
    expected = {name: p.detach().double().clone() for name, p in trainer.student.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = copy.deepcopy(first)
    for step in range(6):
        trainer.advance(batch(step), text(step), 3)
        rate = rate_at(step, 6, trainer.config)
        for name, parameter in trainer.student.named_parameters():
            gradient = parameter.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            mean = first[name] / (1 - 0.9 ** (step + 1))
            square = second[name] / (1 - beta2 ** (step + 1))
            expected[name] -= rate * mean / (square.sqrt() + 1e-8)
    for name, parameter in zip(names, trainer.student.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.detach().double(), expected[name], rtol=1e-4, atol=1e-5, msg=name
        )


def test_total_is_the_sum_of_the_weighted_terms():
    """The gradient is that of the plain sum of all terms that are reported."""
    trainer = trainer_of(weights=LossWeights(image=3, conv5=0.5), image_scale=2)
    reference = copy.deepcopy(trainer.student)
    terms, norm = trainer.advance(batch(0), text(0), 3)
    image = batch(0).pixels.float() / 127.5 - 1
    real, drawn = trainer.teacher(image), trainer.teacher(reference(text(0))["image"])
    total = 0
    for name, tap in drawn.items():
        weight = {"image": 3 * 2}.get(name, 0.5 if name[:5] in ("conv5", "pool5") else 1)
        term = weight * (tap - real[name]).abs().mean()
        assert float(terms[name]) == pytest.approx(float(term.detach()), rel=1e-4)
        total = total + term
    total.backward()
    square = sum(float(p.grad.double().pow(2).sum()) for p in reference.parameters())
    assert float(norm) == pytest.approx(square**0.5, rel=1e-3)


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    """In bf16 the networks run in bfloat16; weights, optimizer and terms stay float32."""
    seen = {}
    for precision in ("float32", "bf16"):
        trainer = trainer_of(precision)
        kinds = set()
        hook = trainer.student.convs["image"].register_forward_hook(
            lambda module, given, result, kinds=kinds: kinds.add(result.dtype)
        )
        terms, _ = trainer.advance(batch(0), text(0), 3)
        hook.remove()
        seen[precision] = kinds
        assert {term.dtype for term in terms.values()} == {torch.float32}
        assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
        moments = trainer.optimizer.state_dict()["state"].values()
        assert {state["exp_avg"].dtype for state in moments} == {torch.float32}
    assert seen == {"float32": {torch.float32}, "bf16": {torch.bfloat16}}


def test_bf16_losses_are_near_those_of_float32():
    """The sum in bf16 is within 2% of that in float32, and each term within its rounding."""
    exact, rough = (
        {name: float(term.detach()) for name, term in found.items()}
        for found in (
            trainer_of(p).losses(text(0), torch.zeros(3, 3, 32, 32)) for p in ("float32", "bf16")
        )
    )
    assert rough == pytest.approx(exact, rel=0.15)  # of small differences of like activations
    assert sum(rough.values()) == pytest.approx(sum(exact.values()), rel=0.02)


def test_a_restored_trainer_keeps_the_checkpoints_precision():
    """What a stage began to compute in, it goes on computing in."""
    checkpoint = trainer_of("bf16").checkpoint()
    trainer = trainer_of("float32")
    trainer.restore(checkpoint)
    assert trainer.precision == "bf16"

"""The L1 distance and the weighted terms built from it."""

import pytest
import torch
from torch.nn import functional

from sdn.config import LossWeights
from sdn.losses import distance, tap_losses, wanted_taps

SHAPES = [(2, 3, 8, 8), (1, 5, 4, 4), (12, 4, 1, 1), (3, 7), (6,)]


def pair(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return a.requires_grad_(), b


def gradient_of(loss, tensor):
    (gradient,) = torch.autograd.grad(loss, tensor)
    return gradient


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_equals_l1_loss_in_value_and_gradient(shape):
    """In float32 the distance is torch's l1_loss to 1e-6, and so is its gradient."""
    a, b = pair(shape)
    reference = functional.l1_loss(a, b)
    ours = distance(a, b)
    assert ours.ndim == 0
    assert ours.item() == pytest.approx(reference.item(), rel=1e-6)
    torch.testing.assert_close(
        gradient_of(ours, a), gradient_of(reference, a), rtol=1e-6, atol=1e-9
    )


def test_distance_of_literal_numbers():
    """mean |a - b| of four numbers, by hand."""
    a = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    b = torch.tensor([[0.0, 2.0], [0.5, 1.0]])
    assert distance(a, b).item() == (1 + 4 + 0 + 3) / 4


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_distance_in_bf16_stays_within_its_rounding(memory_format):
    """In bfloat16 value and gradient agree with float32 on the same numbers to one rounding."""
    a, b = pair((4, 16, 16, 16), torch.bfloat16)
    a = a.detach().to(memory_format=memory_format).requires_grad_()
    exact = functional.l1_loss(a.float(), b.float())
    ours = distance(a, b)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=2**-8)
    gradient = gradient_of(ours, a)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(
        gradient.float(), gradient_of(exact, a).float(), rtol=2**-8, atol=1e-9
    )


def test_distance_in_bf16_does_not_stall_on_many_elements():
    """A sum of 200,704 elements an image is accumulated in more digits than bfloat16 has."""
    a = torch.full((2, 64, 56, 56), 1.0, dtype=torch.bfloat16)
    assert distance(a, torch.zeros_like(a)).item() == pytest.approx(1.0, rel=2**-8)


def test_distance_in_fp16_does_not_overflow_on_many_elements():
    """A sum of 200,704 elements an image is more than float16 can hold."""
    a = torch.full((2, 64, 56, 56), 1.0, dtype=torch.float16)
    assert distance(a, torch.zeros_like(a)).item() == pytest.approx(1.0, rel=2**-10)


def test_gradient_is_exactly_zero_where_equal():
    """Elements that already agree get a gradient of exactly 0, the others +-1/N."""
    a, b = pair((2, 3, 4, 4))
    with torch.no_grad():
        a[:, 1] = b[:, 1]
    gradient = gradient_of(distance(a, b), a)
    assert torch.equal(gradient[:, 1], torch.zeros_like(gradient[:, 1]))
    expected = (a - b).detach().sign() / a.numel()
    assert torch.equal(gradient[:, [0, 2]], expected[:, [0, 2]])
    assert gradient[:, 0].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distance_of_equal_tensors_is_zero(dtype):
    """d(a, a) = 0 exactly, with a gradient of exactly 0."""
    a, _ = pair((2, 3, 4, 4), dtype)
    loss = distance(a, a.detach().clone())
    assert loss.item() == 0
    assert not gradient_of(loss, a).any()


def test_distance_is_symmetric_in_value_and_positive():
    """d(a, b) = d(b, a) > 0 for different tensors, and d(2a, 2b) = 2 d(a, b)."""
    a, b = pair((2, 3, 4, 4))
    assert distance(a, b).item() == distance(b, a).item() > 0
    assert distance(2 * a, 2 * b).item() == pytest.approx(2 * distance(a, b).item(), rel=1e-6)


def test_no_gradient_reaches_the_second_argument():
    """The target is a constant: it gets no gradient even where it asks for one."""
    a, b = pair((2, 3))
    b.requires_grad_()
    distance(a, b).backward()
    assert a.grad is not None
    assert b.grad is None


def test_upstream_gradient_scales_the_gradient():
    """A factor outside the distance multiplies its gradient."""
    a, b = pair((2, 3, 4, 4))
    once = gradient_of(distance(a, b), a)
    torch.testing.assert_close(gradient_of(-3.5 * distance(a, b), a), -3.5 * once)


def taps(seed, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


SHAPED = {
    "image": (2, 3, 8, 8),
    "conv1_1": (2, 4, 8, 8),
    "conv1_2": (2, 4, 8, 8),
    "pool1": (2, 4, 4, 4),
    "conv2_1": (2, 6, 4, 4),
}


def test_squared_distances_have_squared_scales():
    """The mean square of the differences, by the weight; the scale is that of the activations."""
    taps = {"pool1": torch.tensor([[1.0, -2.0]], requires_grad=True)}
    real = {"pool1": torch.tensor([[0.0, 1.0]])}
    weights = LossWeights(conv1=3.0)
    losses = tap_losses(taps, real, weights, {"pool1": 2.0}, "l2")
    assert losses["pool1"].item() == pytest.approx(3 * 4 * (1 + 9) / 2)
    gradient = gradient_of(losses["pool1"], taps["pool1"])
    torch.testing.assert_close(gradient, torch.tensor([[12.0, -36.0]]))


def test_each_term_is_weight_times_scale_times_distance():
    """A term is its group's weight times its tap's scale (1 if absent) times the L1."""
    student, teacher = taps(1, **SHAPED), taps(2, **SHAPED)
    weights = LossWeights(image=20, conv1=0.5, conv2=3)
    losses = tap_losses(student, teacher, weights, {"conv1_2": 7.0, "image": 127.5})
    factors = {"image": 20 * 127.5, "conv1_1": 0.5, "conv1_2": 3.5, "pool1": 0.5, "conv2_1": 3}
    assert list(losses) == list(SHAPED)
    for name, loss in losses.items():
        expected = factors[name] * (student[name] - teacher[name]).abs().mean().item()
        assert loss.item() == pytest.approx(expected, rel=1e-6), name
        assert loss.ndim == 0


def test_a_group_weight_is_linear_and_leaves_other_groups_alone():
    """Three times the weight gives three times that group's terms and gradient, no more."""
    student, teacher = taps(1, **SHAPED), taps(2, **SHAPED)
    for tap in student.values():
        tap.requires_grad_()
    one = tap_losses(student, teacher, LossWeights(conv1=1), {})
    three = tap_losses(student, teacher, LossWeights(conv1=3), {})
    for name in SHAPED:
        factor = 3 if name in ("conv1_1", "conv1_2", "pool1") else 1
        assert three[name].item() == pytest.approx(factor * one[name].item(), rel=1e-6), name
        torch.testing.assert_close(
            gradient_of(three[name], student[name]), factor * gradient_of(one[name], student[name])
        )


def test_a_taps_own_weight_replaces_its_groups():
    """A weight given for one tap stands in place of its group's, which the others keep."""
    student, teacher = taps(1, **SHAPED), taps(2, **SHAPED)
    plain = tap_losses(student, teacher, LossWeights(), {})
    own = tap_losses(student, teacher, LossWeights(conv1=2, taps={"pool1": 5, "image": 0.25}), {})
    ratios = {name: (own[name] / plain[name]).item() for name in SHAPED}
    assert ratios == pytest.approx(
        {"image": 0.25, "conv1_1": 2, "conv1_2": 2, "pool1": 5, "conv2_1": 1}, rel=1e-6
    )


@pytest.mark.parametrize("missing", ["image", "pool1", "conv2_1"])
def test_a_missing_tap_is_named(missing):
    """A tap that the student lacks is refused by name, with the shape that was expected."""
    student, teacher = taps(1, **SHAPED), taps(2, **SHAPED)
    del student[missing]
    with pytest.raises(ValueError, match=rf"tap {missing}: student has nothing, teacher \(2, "):
        tap_losses(student, teacher, LossWeights(), {})


def test_a_wrong_shape_is_named_with_both_shapes():
    """Shapes that differ are refused, even where they would broadcast."""
    student, teacher = taps(1, **SHAPED), taps(2, **SHAPED)
    student["pool1"] = student["pool1"][:1]
    with pytest.raises(
        ValueError, match=r"tap pool1: student has \(1, 4, 4, 4\), teacher \(2, 4, 4, 4\)"
    ):
        tap_losses(student, teacher, LossWeights(), {})


def test_taps_that_only_the_student_has_are_ignored():
    """Only the teacher's taps become terms."""
    student, teacher = taps(1, **SHAPED), taps(2, image=SHAPED["image"])
    assert list(tap_losses(student, teacher, LossWeights(), {})) == ["image"]


def test_wanted_taps_leaves_out_weight_zero_and_keeps_the_order():
    """Taps of weight 0, by group or by name, are not wanted; the rest keep their order."""
    weights = LossWeights(conv1=0, conv2=1, taps={"pool1": 2, "conv2_1": 0})
    names = ["image", "conv1_1", "conv1_2", "pool1", "conv2_1", "conv2_2", "pool2"]
    assert wanted_taps(names, weights) == ("image", "pool1", "conv2_2", "pool2")

"""Both distillation stages against the formulas written out, term for term."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from sdn.config import LossWeights, StageConfig, StudentConfig
from sdn.recipes import recipe
from sdn.stage_run import new_student
from sdn.stages import STAGES, as_wide_as, scales_of, stage_one_losses, stage_two_losses
from sdn.student import Student
from sdn.taps import blocks_of
from sdn.teacher import Teacher, empty_teacher

VGG19_CONVS = ((1, 2), (2, 2), (3, 4), (4, 4), (5, 4))
VGG19_TAPS = ["image"] + [
    name
    for k, n in VGG19_CONVS
    for name in [*(f"conv{k}_{i}" for i in range(1, n + 1)), f"pool{k}"]
]
WEIGHTS = LossWeights(image=20, conv1=0.5, conv2=2, conv3=1, conv4=0.3, conv5=3, taps={"pool3": 7})
FACTORS = {"image": 20, "conv1": 0.5, "conv2": 2, "conv3": 1, "conv4": 0.3, "conv5": 3}


def pair_of(arch="vgg19", width=0.02, convention="symmetric", text_dim=8):
    """A teacher and its student at 32 px."""
    torch.manual_seed(0)
    teacher = Teacher(blocks_of(arch, width), convention)
    for conv in teacher.convs.values():  # signals that reach the top of narrow networks
        torch.nn.init.normal_(conv.weight, 0, (2 / conv.weight[0].numel()) ** 0.5)
        torch.nn.init.uniform_(conv.bias, 0, 0.2)
    student = Student(
        teacher.blocks, resolution=32, text_dim=text_dim, width=width, init="he", seed=1
    )
    for name, parameter in student.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0, 0.2)
    return teacher, student


def batch_of(n=3, text_dim=8):
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(n, text_dim, generator=generator)
    return text, torch.rand(n, 3, 32, 32, generator=generator) * 2 - 1


def literal_teacher(teacher, image, *, release):
    """VGG19's taps of an image, from the published list; `release` feeds BGR over 0..255."""
    x = image
    if release:
        x = torch.stack([(image[:, c] + 1) / 2 * 255 for c in (2, 1, 0)], dim=1)
    taps = {"image": image}
    for name in VGG19_TAPS[1:]:
        if name.startswith("pool"):
            quarters = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
            x = (quarters[0] + quarters[1] + quarters[2] + quarters[3]) / 4
        else:
            conv = teacher.convs[name]
            x = functional.conv2d(x, conv.weight, conv.bias, padding=1).clamp(min=0)
        taps[name] = x
    return taps


def literal_student(student, text):
    """VGG19's mirror from the published table."""
    x = (text @ student.fc7.weight.T + student.fc7.bias).clamp(min=0)
    x = (x @ student.fc6.weight.T + student.fc6.bias).clamp(min=0)
    x = (x @ student.pool.weight.T + student.pool.bias).clamp(min=0).reshape(len(text), -1, 1, 1)
    taps = {"pool5": x}
    for k, n in reversed(VGG19_CONVS):
        x = taps[f"conv{k}_{n}"] = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        for name in [*(f"conv{k}_{i}" for i in range(n - 1, 0, -1)), f"pool{k - 1}"]:
            name = "image" if name == "pool0" else name  # noqa: PLW2901
            conv = student.convs[name]
            x = functional.conv2d(x, conv.weight, conv.bias, padding=1)
            x = taps[name] = x if name == "image" else x.clamp(min=0)
    return taps


def mean_absolute(a, b):
    """mean |a - b|, summed image by image and channel by channel."""
    total = 0.0
    for image_a, image_b in zip(a.detach(), b.detach(), strict=True):
        for channel_a, channel_b in zip(image_a, image_b, strict=True):
            total += (channel_a.double() - channel_b.double()).abs().sum().item()
    return total / a.numel()


def mean_squared(a, b):
    """Mean squared difference, over every element in float64."""
    return (a.detach().double() - b.detach().double()).pow(2).sum().item() / a.numel()


def literal_losses(stage, teacher, student, text, image, *, release=False, of=mean_absolute):
    """The 22 unweighted distances of a stage, from its formula."""
    real = literal_teacher(teacher, image, release=release)
    made = literal_student(student, text)
    if stage == "stage_two":
        made = literal_teacher(teacher, made["image"], release=release)
    return {name: of(real[name], made[name]) for name in VGG19_TAPS}


@pytest.mark.parametrize("stage", list(STAGES))
def test_both_stages_equal_their_formula_term_for_term(stage):
    """22 terms of VGG19: weight times L1 between T(x) and S(t), or T(x) and T(S(t))."""
    teacher, student = pair_of()
    text, image = batch_of()
    losses = STAGES[stage](student, teacher, text, image, weights=WEIGHTS, scales={})
    reference = literal_losses(stage, teacher, student, text, image)
    assert list(losses) == VGG19_TAPS
    assert len(losses) == 22
    for name, loss in losses.items():
        weight = 7 if name == "pool3" else FACTORS[name.replace("pool", "conv").split("_")[0]]
        assert reference[name] > 0, name
        assert loss.item() == pytest.approx(weight * reference[name], rel=1e-4), name


@pytest.mark.parametrize("stage", list(STAGES))
def test_squared_distances_have_the_square_of_their_scale(stage):
    """As L1, with the mean of squares; a unit's factor counts twice."""
    teacher, student = pair_of()
    text, image = batch_of()
    scales = {"image": 3.0, "conv4_1": 0.5}
    losses = STAGES[stage](student, teacher, text, image, weights=WEIGHTS, scales=scales, kind="l2")
    reference = literal_losses(stage, teacher, student, text, image, of=mean_squared)
    assert list(losses) == VGG19_TAPS
    for name, loss in losses.items():
        factor = WEIGHTS.of(name) * scales.get(name, 1) ** 2
        assert loss.item() == pytest.approx(factor * reference[name], rel=1e-4), name


@pytest.mark.parametrize("stage", list(STAGES))
def test_recipe_release_cub_equals_the_release(stage):
    """release-cub, shrunk: 22 weights of 1, BGR 0..255 to the teacher, pixels over 0..255."""
    full = recipe("release-cub")
    config = dataclasses.replace(
        full,
        data=dataclasses.replace(full.data, resolution=32),
        teacher=dataclasses.replace(full.teacher, width=0.02, weights=None, sha256=None),
        captions=dataclasses.replace(full.captions, dim=8),
    )
    settings = getattr(config, stage)
    assert settings.image_scale == 127.5
    assert settings.scale == "raw"
    assert {settings.weights.of(name) for name in VGG19_TAPS} == {1.0}
    torch.manual_seed(0)
    teacher = empty_teacher(config.teacher)
    assert teacher.convention == "release"
    student = Student(
        teacher.blocks,
        resolution=config.data.resolution,
        text_dim=config.captions.dim,
        width=config.teacher.width,
        init=config.student.init,
    )
    text, image = batch_of()
    scales = scales_of(settings, dict.fromkeys(teacher.names, 3.0))
    losses = STAGES[stage](student, teacher, text, image, weights=settings.weights, scales=scales)
    reference = literal_losses(stage, teacher, student, text, image, release=True)
    # The release's pixel term: both images over 0..255.
    made = literal_student(student, text)["image"]
    reference["image"] = mean_absolute((image + 1) / 2 * 255, (made + 1) / 2 * 255)
    assert list(losses) == VGG19_TAPS
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(reference[name], rel=1e-3, abs=1e-6), name
    total = torch.stack(list(losses.values())).sum().item()
    assert total == pytest.approx(sum(reference.values()), rel=1e-4)


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_term_of_weight_zero_is_absent_and_not_computed(stage):
    """Taps of weight 0 give no term, and the teacher computes nothing above the last wanted one."""
    teacher, student = pair_of()
    text, image = batch_of()
    ran = set()
    for name, conv in teacher.convs.items():
        conv.register_forward_hook(lambda *_, name=name: ran.add(name))
    weights = LossWeights(conv3=0, conv4=0, conv5=0, taps={"conv1_1": 0, "conv3_1": 2})
    losses = STAGES[stage](student, teacher, text, image, weights=weights, scales={})
    assert list(losses) == ["image", "conv1_2", "pool1", "conv2_1", "conv2_2", "pool2", "conv3_1"]
    assert ran == {"conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1"}


@pytest.mark.parametrize("stage", list(STAGES))
def test_pixel_term_alone_runs_no_convolution_of_the_teacher(stage):
    """With the image's weight alone, both stages are the pixel L1."""
    teacher, student = pair_of()
    text, image = batch_of()
    for conv in teacher.convs.values():
        conv.register_forward_hook(lambda *_: pytest.fail("a convolution ran"))
    weights = LossWeights(conv1=0, conv2=0, conv3=0, conv4=0, conv5=0)
    losses = STAGES[stage](student, teacher, text, image, weights=weights, scales={})
    expected = (student(text)["image"] - image).abs().mean().item()
    assert list(losses) == ["image"]
    assert losses["image"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_student_parameter_gets_a_gradient_and_the_teacher_none(stage):
    """The sum of a stage's terms reaches all 19 layers of the student, the teacher stays out."""
    teacher, student = pair_of(width=0.0625)
    text, image = batch_of(8)
    losses = STAGES[stage](student, teacher, text, image, weights=LossWeights(), scales={})
    torch.stack(list(losses.values())).sum().backward()
    parameters = dict(student.named_parameters())
    assert len(parameters) == 2 * 19
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert teacher.factor.grad is None


def test_stage_two_reaches_every_student_parameter_through_its_deepest_tap():
    """pool5 of the synthesis alone trains all of the student: the gradient passes the teacher."""
    teacher, student = pair_of(width=0.0625)
    text, image = batch_of(8)
    weights = LossWeights(image=0, conv1=0, conv2=0, conv3=0, conv4=0, conv5=0, taps={"pool5": 1})
    losses = stage_two_losses(student, teacher, text, image, weights=weights, scales={})
    assert list(losses) == ["pool5"]
    losses["pool5"].backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(p.grad is None for p in teacher.parameters())


def test_stage_two_gradient_equals_autograds():
    """The gradient of stage two is that of the formula with torch's own l1_loss."""
    teacher, student = pair_of()
    text, image = batch_of()
    losses = stage_two_losses(student, teacher, text, image, weights=WEIGHTS, scales={"image": 3.0})
    torch.stack(list(losses.values())).sum().backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    real = literal_teacher(teacher, image, release=False)
    made = literal_teacher(teacher, literal_student(student, text)["image"], release=False)
    total = sum(
        WEIGHTS.of(name) * (3.0 if name == "image" else 1.0) * functional.l1_loss(made[name], t)
        for name, t in real.items()
    )
    total.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_stage_one_trains_all_layers_from_the_first_step_by_their_own_terms():
    """A term of an inner tap has a gradient for the layers above it, none for those below."""
    teacher, student = pair_of(width=0.0625)
    text, image = batch_of(8)
    losses = stage_one_losses(student, teacher, text, image, weights=LossWeights(), scales={})
    losses["pool3"].backward()
    above = {"fc7", "fc6", "pool", "convs.conv5_1", "convs.pool4", "convs.conv4_1", "convs.pool3"}
    below = {"convs.conv3_3", "convs.pool2", "convs.conv1_1", "convs.image"}
    gradients = {name: p.grad for name, p in student.named_parameters()}
    for layer in above:
        assert gradients[f"{layer}.weight"] is not None, layer
        assert gradients[f"{layer}.weight"].any(), layer
    for layer in below:
        assert gradients[f"{layer}.weight"] is None, layer


def test_stage_one_runs_the_teacher_on_the_real_image_alone():
    """Stage one's teacher sees the real batch once; stage two's then also the synthesis."""
    teacher, student = pair_of()
    text, image = batch_of()
    seen = []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    options = {"weights": LossWeights(), "scales": {}}
    stage_one_losses(student, teacher, text, image, **options)
    assert len(seen) == 1
    assert torch.equal(seen[0], image)
    seen.clear()
    stage_two_losses(student, teacher, text, image, **options)
    assert len(seen) == 2
    assert torch.equal(seen[0], image)
    assert torch.equal(seen[1], student(text)["image"])


def test_stage_two_needs_only_the_image_of_the_student():
    """The student's inner taps play no part in stage two; stage one cannot do without them."""
    teacher, student = pair_of()
    text, image = batch_of()
    options = {"weights": LossWeights(), "scales": {}}

    def only_image(captions, _wanted=None):
        return {"image": student(captions)["image"]}

    whole = stage_two_losses(student, teacher, text, image, **options)
    part = stage_two_losses(only_image, teacher, text, image, **options)
    assert {n: x.item() for n, x in whole.items()} == {n: x.item() for n, x in part.items()}
    with pytest.raises(ValueError, match="tap conv1_1: student has nothing"):
        stage_one_losses(only_image, teacher, text, image, **options)


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_perfect_student_has_no_loss(stage):
    """Where the student returns the teacher's own taps of the real image, every term is 0."""
    teacher, _ = pair_of()
    text, image = batch_of()
    losses = STAGES[stage](
        lambda *_: teacher(image), teacher, text, image, weights=LossWeights(), scales={}
    )
    assert {loss.item() for loss in losses.values()} == {0.0}
    assert len(losses) == 22


@pytest.mark.parametrize("stage", list(STAGES))
def test_another_resolution_is_named(stage):
    """Images of another size than the student's are refused at the first tap, with both shapes."""
    teacher, student = pair_of()
    text, _ = batch_of()
    with pytest.raises(
        ValueError, match=r"tap image: student has \(3, 3, 32, 32\), teacher \(3, 3, 64, 64\)"
    ):
        STAGES[stage](
            student, teacher, text, torch.zeros(3, 3, 64, 64), weights=LossWeights(), scales={}
        )


def test_raw_scale_is_one_and_the_image_scale_its_own_factor():
    """Raw distances have factor 1 whatever the activations; the pixel term has image_scale."""
    means = {"image": 0.5, "conv1_1": 40.0, "pool5": 0.01}
    assert scales_of(StageConfig(), means) == dict.fromkeys(means, 1.0)
    assert scales_of(StageConfig(image_scale=127.5), means) == {
        "image": 127.5,
        "conv1_1": 1.0,
        "pool5": 1.0,
    }


def test_relative_scale_is_one_over_the_mean_activation():
    """Relative distances are divided by the tap's mean activation; a dead tap stays finite."""
    means = {"image": 0.5, "conv1_1": 40.0, "pool5": 0.01, "pool4": 0.0}
    scales = scales_of(StageConfig(scale="relative", image_scale=3), means)
    assert scales == pytest.approx(
        {"image": 3 / 0.5, "conv1_1": 1 / 40, "pool5": 100.0, "pool4": 1e6}
    )
    assert means["image"] == 0.5


@pytest.mark.parametrize("stage", list(STAGES))
def test_relative_scale_makes_terms_independent_of_the_activations_unit(stage):
    """With relative scale each term is the raw one over the tap's mean activation."""
    teacher, student = pair_of()
    text, image = batch_of()
    means = {name: tap.abs().mean().item() for name, tap in teacher(image).items()}
    options = {"weights": LossWeights()}
    raw = STAGES[stage](
        student, teacher, text, image, scales=scales_of(StageConfig(), means), **options
    )
    relative = STAGES[stage](
        student,
        teacher,
        text,
        image,
        scales=scales_of(StageConfig(scale="relative"), means),
        **options,
    )
    for name, loss in relative.items():
        assert loss.item() == pytest.approx(raw[name].item() / means[name], rel=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrower_student_is_compared_with_means_of_groups(dtype):
    """Each of its channels with the mean of the teacher's neighbouring ones; the image as it is."""
    torch.manual_seed(0)
    teacher = {"image": torch.rand(2, 3, 8, 8), "pool1": torch.rand(2, 6, 4, 4)}
    teacher = {name: tap.to(dtype) for name, tap in teacher.items()}
    student = {"image": torch.zeros(2, 3, 8, 8), "pool1": torch.zeros(2, 2, 4, 4)}
    found = as_wide_as(student, teacher)
    assert found["image"] is teacher["image"]
    groups = torch.stack([teacher["pool1"][:, :3].mean(1), teacher["pool1"][:, 3:].mean(1)], dim=1)
    torch.testing.assert_close(found["pool1"], groups)
    assert found["pool1"].dtype == dtype


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_narrower_student_has_every_term(stage):
    """Half and a third of the channels: a term a tap, with a gradient, in both stages."""
    for share in (0.5, 0.35):
        config = dataclasses.replace(recipe("tiny"), student=StudentConfig(init="he", width=share))
        teacher, student = empty_teacher(config.teacher), new_student(config)
        assert student.blocks == blocks_of("vgg11", 0.125 * share)
        for conv in teacher.convs.values():
            torch.nn.init.normal_(conv.weight, 0, (2 / conv.weight[0].numel()) ** 0.5)
        text, image = batch_of(text_dim=config.captions.dim)
        losses = STAGES[stage](student, teacher, text, image, weights=WEIGHTS, scales={})
        assert list(losses) == list(teacher.names)
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is not None for p in student.parameters())

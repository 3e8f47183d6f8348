"""The student mirrors its teacher; size, initial weights and forward pass follow the method."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from sdn.chroma import subsampled
from sdn.student import Student
from sdn.taps import ARCHITECTURES, blocks_of, taps_of
from sdn.teacher import Teacher

RESOLUTIONS = (32, 64, 96)
WIDTHS = (0.03, 0.0625)
NARROW = blocks_of("vgg11", 0.0625)

# The published student's 16 convolutions (channels in, out) and 3 linear layers, top first.
PUBLISHED_CONVS = (
    [(512, 512)] * 4
    + [(512, 512)] * 3
    + [(512, 256)]
    + [(256, 256)] * 3
    + [
        (256, 128),
        (128, 128),
        (128, 64),
        (64, 64),
        (64, 3),
    ]
)
PUBLISHED_LINEARS = [(1024, 4096), (4096, 4096), (4096, 512 * 7 * 7)]


def student_of(arch="vgg11", width=0.0625, resolution=32, text_dim=12, **options):
    return Student(
        blocks_of(arch, width), resolution=resolution, text_dim=text_dim, width=width, **options
    )


def weights_of(student, kind):
    return [m.weight for m in student.modules() if isinstance(m, kind)]


@pytest.fixture(autouse=True)
def seeded():
    """The same random texts in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def published():
    """The student mirrored from VGG19 at 224 px for 1024 numbers of text, without storage."""
    with torch.device("meta"):
        return Student(blocks_of("vgg19", 1.0), resolution=224, text_dim=1024)


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_student_taps_equal_teacher_taps_in_names_and_shapes(arch, width, resolution):
    """One forward gives the image and a tap for each of the teacher's, of the same shape."""
    student = student_of(arch, width, resolution)
    teacher = Teacher(blocks_of(arch, width), "symmetric")
    with torch.no_grad():
        came = student(torch.randn(2, 12))
        real = teacher(torch.zeros(2, 3, resolution, resolution))
    assert {n: t.shape for n, t in came.items()} == {n: t.shape for n, t in real.items()}
    assert {name: tuple(tap.shape) for name, tap in came.items()} == {
        tap.name: (2, tap.channels, resolution // tap.divisor, resolution // tap.divisor)
        for tap in taps_of(blocks_of(arch, width))
    }


def test_published_student_has_16_convolutions_and_3_linear_layers(published):
    """Mirrored from VGG19, the student has the published layers with the published channels."""
    convs = [m for m in published.modules() if isinstance(m, nn.Conv2d)]
    linears = [m for m in published.modules() if isinstance(m, nn.Linear)]
    assert [(c.in_channels, c.out_channels) for c in convs] == PUBLISHED_CONVS
    assert [(f.in_features, f.out_features) for f in linears] == PUBLISHED_LINEARS
    assert len(convs) == 16
    assert len(linears) == 3
    assert all(c.kernel_size == (3, 3) for c in convs)
    assert all(c.stride == (1, 1) for c in convs)
    assert all(c.padding == (1, 1) for c in convs)


def test_published_student_has_143_8_million_parameters(published):
    """The parameters are exactly those that the method's table adds up to, biases included."""
    linear = sum((i + 1) * o for i, o in PUBLISHED_LINEARS)
    conv = sum((9 * i + 1) * o for i, o in PUBLISHED_CONVS)
    assert sum(p.numel() for p in published.parameters()) == linear + conv
    assert round((linear + conv) / 1e6, 1) == 143.8
    assert round(linear / 1e6, 1) == 123.8


def test_published_student_has_the_published_tap_shapes(published):
    """At 224 px the top tap is 512x7x7 and the image 3x224x224, with 22 taps in all."""
    with torch.no_grad():
        taps = published(torch.empty(2, 1024, device="meta"))
    assert len(taps) == 22
    assert tuple(taps["pool5"].shape) == (2, 512, 7, 7)
    assert tuple(taps["pool3"].shape) == (2, 256, 28, 28)
    assert tuple(taps["conv1_2"].shape) == (2, 64, 224, 224)
    assert tuple(taps["image"].shape) == (2, 3, 224, 224)


def test_student_has_nothing_but_convolutions_and_linear_layers():
    """No normalisation, no dropout, no buffers: two equal captions give two equal images."""
    student = student_of()
    leaves = {type(m) for m in student.modules() if not list(m.children())}
    assert leaves == {nn.Conv2d, nn.Linear}
    assert not list(student.buffers())
    text = torch.randn(1, 12)
    student.train()
    first, second = student(text.expand(2, -1))["image"]
    assert torch.equal(first, second)
    assert torch.equal(student(text)["image"], student.eval()(text)["image"])


def test_release_initialisation_has_the_published_deviations():
    """Release init: convolutions N(0, 0.02), linear layers N(0, 0.1), biases 0."""
    student = student_of("vgg19", 0.125, 64, text_dim=64, init="release")
    for kind, deviation in ((nn.Conv2d, 0.02), (nn.Linear, 0.1)):
        weights = torch.cat([w.flatten() for w in weights_of(student, kind)])
        assert weights.std().item() == pytest.approx(deviation, rel=0.02)
        assert abs(weights.mean().item()) < 0.02 * deviation
        # A normal distribution: 68.3% within one deviation, 4.55% beyond two.
        share = ((weights.abs() < deviation).float().mean()).item()
        assert share == pytest.approx(0.683, abs=0.01)
        for weight in weights_of(student, kind):
            if weight.numel() > 2000:
                assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    biases = [p for name, p in student.named_parameters() if name.endswith("bias")]
    assert len(biases) == 19
    assert all(torch.equal(b, torch.zeros_like(b)) for b in biases)


def test_he_initialisation_follows_the_fan_in():
    """He init: every layer's deviation is sqrt(2 / fan in), biases 0."""
    student = student_of("vgg13", 0.25, 32, text_dim=64, init="he")
    for weight in weights_of(student, (nn.Conv2d, nn.Linear)):
        if weight.numel() > 2000:
            fan_in = weight[0].numel()
            assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.1)
    assert all(not p.any() for name, p in student.named_parameters() if name.endswith("bias"))


def test_identity_initialisation_begins_near_the_identity():
    """Convolutions that keep their channels: a quarter of He's plus identity; others as He's."""
    he = student_of("vgg13", init="he", seed=3)
    near = student_of("vgg13", init="identity", seed=3)
    kept = 0
    for (name, a), (_, b) in zip(he.named_modules(), near.named_modules(), strict=True):
        if not isinstance(a, (nn.Conv2d, nn.Linear)):
            continue
        expected = a.weight.detach().clone()
        if isinstance(a, nn.Conv2d) and a.in_channels == a.out_channels:
            kept += 1
            expected *= 0.25
            for channel in range(a.in_channels):
                expected[channel, channel, 1, 1] += math.sqrt(1 - 0.25**2)
        torch.testing.assert_close(b.weight, expected, msg=name)
        assert not b.bias.any(), name
    assert kept == 6  # conv1_1 to conv5_1, and pool4


def test_the_seed_decides_the_initial_weights():
    """Equal seeds give bit-for-bit equal students, whatever the global generator does."""
    torch.manual_seed(1)
    a = student_of(seed=3).state_dict()
    torch.manual_seed(2)
    b, c = student_of(seed=3).state_dict(), student_of(seed=4).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["fc7.weight"], c["fc7.weight"])


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_last_convolution_of_a_block_is_the_upsampled_pool(arch):
    """conv{k}_{last} is pool{k} with each value repeated twice in height and width."""
    blocks = blocks_of(arch, 0.0625)
    taps = student_of(arch, init="he")(torch.randn(2, 12))
    for k, (_, convolutions) in enumerate(blocks, start=1):
        repeated = taps[f"pool{k}"].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        assert torch.equal(taps[f"conv{k}_{convolutions}"], repeated)
        assert repeated.any()


def test_only_the_image_is_without_relu():
    """The image is linear (both signs occur); every other tap is >= 0 and really cut at 0."""
    taps = student_of("vgg13", init="he")(torch.randn(8, 12))
    image = taps.pop("image")
    assert (image < 0).any()
    assert (image > 0).any()
    for name, tap in taps.items():
        assert (tap >= 0).all(), name
        assert (tap == 0).any(), name
        assert (tap > 0).any(), name


@pytest.mark.parametrize("condition", ["top", "levels"])
@pytest.mark.parametrize("leak", [0, 0.1])
def test_forward_equals_the_table_written_out(leak, condition):
    """The forward pass is the published chain of layers, written out here for a small VGG11.

    With the text at each level a convolution's sums are scaled and shifted by it.
    """
    student = student_of(init="he", leak=leak, condition=condition).double()
    for level in (student.levels or {}).values():
        nn.init.normal_(level.weight, 0, 0.3)
        nn.init.normal_(level.bias, 0, 0.3)

    def rectified(sums):
        return torch.where(sums > 0, sums, leak * sums)

    text = torch.randn(3, 12, dtype=torch.float64)
    x = rectified(text @ student.fc7.weight.T + student.fc7.bias)
    x = rectified(x @ student.fc6.weight.T + student.fc6.bias)
    x = rectified(x @ student.pool.weight.T + student.pool.bias)
    x = x.reshape(3, NARROW[-1][0], 1, 1)
    expected = {"pool5": x}
    for block in (
        ["conv5_2", "conv5_1", "pool4"],
        ["conv4_2", "conv4_1", "pool3"],
        ["conv3_2", "conv3_1", "pool2"],
        ["conv2_1", "pool1"],
        ["conv1_1", "image"],
    ):
        x = expected[block[0]] = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        for name in block[1:]:
            conv = student.convs[name]
            x = functional.conv2d(x, conv.weight, conv.bias, padding=1)
            if condition == "levels" and name != "image":
                level = student.levels[name]
                moved = (text @ level.weight.T + level.bias)[:, :, None, None]
                x = x * (1 + moved[:, : x.shape[1]]) + moved[:, x.shape[1] :]
            x = expected[name] = x if name == "image" else rectified(x)
    taps = student(text)
    assert taps.keys() == expected.keys()
    for name, tap in taps.items():
        torch.testing.assert_close(tap, expected[name], msg=name)


def test_text_at_each_level_begins_as_text_at_the_top():
    """The same image from the same seed; and every level learns from the first step."""
    plain, levels = (student_of(init="he", condition=c) for c in ("top", "levels"))
    text = torch.randn(3, 12)
    assert torch.equal(plain(text)["image"], levels(text)["image"])
    levels(text)["image"].square().mean().backward()
    assert levels.levels.keys() == plain.convs.keys() - {"image"}
    assert all(level.weight.grad.abs().sum() > 0 for level in levels.levels.values())


def test_chroma_is_subsampled_in_the_image_alone():
    """All taps are the same; the image is that of the plain student with coarser chroma."""
    plain, coarse = student_of(init="he"), student_of(init="he", chroma=4)
    text = torch.randn(3, 12)
    expected, found = plain(text), coarse(text)
    assert not torch.equal(found["image"], expected["image"])
    assert torch.equal(found.pop("image"), subsampled(expected.pop("image"), 4))
    assert all(torch.equal(tap, found[name]) for name, tap in expected.items())


@pytest.mark.parametrize("chroma", [0, -4, 5, 64])
def test_chroma_that_does_not_divide_the_resolution_is_refused(chroma):
    """Before any weights are made, with both numbers."""
    with pytest.raises(ValueError, match=rf"resolution 32, which {chroma} does not"):
        student_of(chroma=chroma)


def test_captions_of_a_batch_do_not_mix():
    """Each row's image depends on that row's text alone."""
    student = student_of(init="he")
    text = torch.randn(3, 12)
    together = student(text)["image"]
    for row in range(3):
        torch.testing.assert_close(student(text[row : row + 1])["image"][0], together[row])


@pytest.mark.parametrize("resolution", [33, 48, 16])
def test_resolution_that_does_not_halve_often_enough_is_refused(resolution):
    """A resolution that five pools cannot halve is named together with what it must divide by."""
    with pytest.raises(ValueError, match=rf"resolution {resolution} .*divisible by 32"):
        student_of(resolution=resolution)


def test_nothing_below_the_lowest_wanted_tap_is_computed(monkeypatch):
    """Asked for high taps alone, the student stops there; asked for the image, it has all."""
    student = Student(blocks_of("vgg11", 0.05), resolution=32, text_dim=4, width=0.05)
    text = torch.randn(2, 4)
    everything = student(text)
    assert student(text, ("image",)).keys() == everything.keys()
    monkeypatch.setattr(student.convs["pool2"], "forward", lambda x: pytest.fail("computed"))
    found = student(text, ("pool4", "conv3_1"))
    assert {"pool4", "conv3_1"} <= found.keys()
    assert all(torch.equal(tap, everything[name]) for name, tap in found.items())


def test_only_with_a_leak_a_unit_below_0_learns():
    """One that every caption leaves below 0: through the ReLU no gradient comes back."""
    moved = []
    for leak in (0, 0.1):
        student = student_of(init="he", leak=leak)
        with torch.no_grad():
            student.convs["pool3"].bias.fill_(-100)
        student(torch.randn(3, 12))["image"].sum().backward()
        moved.append(bool(student.convs["pool3"].bias.grad.any()))
    assert moved == [False, True]

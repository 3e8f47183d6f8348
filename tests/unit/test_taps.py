"""The mirror table: which taps a teacher has, and which layers the student gets from them."""

import pytest

from sdn.taps import ARCHITECTURES, blocks_of, student_layers, taps_of

# fmt: off
VGG19_TAPS = [
    "image",
    "conv1_1", "conv1_2", "pool1",
    "conv2_1", "conv2_2", "pool2",
    "conv3_1", "conv3_2", "conv3_3", "conv3_4", "pool3",
    "conv4_1", "conv4_2", "conv4_3", "conv4_4", "pool4",
    "conv5_1", "conv5_2", "conv5_3", "conv5_4", "pool5",
]
# fmt: on
"""The published list."""

VGG19_STUDENT = [
    ("conv5_4", True, 512, 512),
    ("conv5_3", False, 512, 512),
    ("conv5_2", False, 512, 512),
    ("conv5_1", False, 512, 512),
    ("pool4", False, 512, 512),
    ("conv4_4", True, 512, 512),
    ("conv4_3", False, 512, 512),
    ("conv4_2", False, 512, 512),
    ("conv4_1", False, 512, 512),
    ("pool3", False, 512, 256),
    ("conv3_4", True, 256, 256),
    ("conv3_3", False, 256, 256),
    ("conv3_2", False, 256, 256),
    ("conv3_1", False, 256, 256),
    ("pool2", False, 256, 128),
    ("conv2_2", True, 128, 128),
    ("conv2_1", False, 128, 128),
    ("pool1", False, 128, 64),
    ("conv1_2", True, 64, 64),
    ("conv1_1", False, 64, 64),
    ("image", False, 64, 3),
]
"""The published student below pool5: tap, upsampling, channels in and out."""


def test_vgg19_has_the_22_published_taps_in_order():
    """VGG19 at width 1 has 22 taps, named and ordered as published."""
    taps = taps_of(blocks_of("vgg19", 1.0))
    assert len(taps) == 22
    assert [tap.name for tap in taps] == VGG19_TAPS


def test_vgg19_taps_have_the_published_shapes_at_224():
    """Channels and resolutions of VGG19's taps at 224 px are those of the published table."""
    shapes = {t.name: (t.channels, 224 // t.divisor) for t in taps_of(blocks_of("vgg19", 1.0))}
    expected = {"image": (3, 224)}
    for k, channels, side, convolutions in (
        (1, 64, 224, 2),
        (2, 128, 112, 2),
        (3, 256, 56, 4),
        (4, 512, 28, 4),
        (5, 512, 14, 4),
    ):
        expected |= {f"conv{k}_{i}": (channels, side) for i in range(1, convolutions + 1)}
        expected[f"pool{k}"] = (channels, side // 2)
    assert shapes == expected


@pytest.mark.parametrize(
    ("arch", "convolutions"), [("vgg11", 8), ("vgg13", 10), ("vgg16", 13), ("vgg19", 16)]
)
def test_named_architectures_have_their_number_of_convolutions(arch, convolutions):
    """An architecture's number is its convolutions plus three linear layers, in five blocks."""
    assert len(ARCHITECTURES[arch]) == 5
    names = [tap.name for tap in taps_of(blocks_of(arch, 1.0))]
    assert sum(name.startswith("conv") for name in names) == convolutions
    assert sum(name.startswith("pool") for name in names) == 5
    assert int(arch.removeprefix("vgg")) == convolutions + 3


@pytest.mark.parametrize(
    ("width", "channels"),
    [
        (0.5, (32, 64, 128, 256, 256)),
        (0.125, (8, 16, 32, 64, 64)),
        (2.0, (128, 256, 512, 1024, 1024)),
        (0.001, (1, 1, 1, 1, 1)),
    ],
)
def test_width_scales_every_channel_and_never_reaches_zero(width, channels):
    """A width factor multiplies all channels, rounds, and leaves at least one."""
    blocks = blocks_of("vgg16", width)
    assert tuple(c for c, _ in blocks) == channels
    assert tuple(n for _, n in blocks) == (2, 2, 3, 3, 3)


def test_student_layers_of_vgg19_are_the_published_table():
    """VGG19's reflection is the published student, layer for layer with its channels."""
    layers = student_layers(blocks_of("vgg19", 1.0))
    found = [(layer.tap, layer.upsample, layer.channels_in, layer.channels_out) for layer in layers]
    assert found == VGG19_STUDENT


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
@pytest.mark.parametrize("width", [0.03, 0.25, 1.0])
def test_student_layers_run_through_the_teachers_taps_backwards(arch, width):
    """Every tap below the top pool has one student layer, in reverse order, channels chained."""
    blocks = blocks_of(arch, width)
    taps, layers = taps_of(blocks), student_layers(blocks)
    # Above the upsampled conv{k}_{last} stands pool{k}: the order is the teacher's, turned round.
    assert [layer.tap for layer in layers] == [tap.name for tap in reversed(taps[:-1])]
    channels = {tap.name: tap.channels for tap in taps}
    running = taps[-1].channels
    for layer in layers:
        assert layer.channels_in == running, layer.tap
        assert layer.channels_out == channels[layer.tap], layer.tap
        running = layer.channels_out


def test_other_block_lists_are_mirrored_too():
    """Nothing is tied to five blocks: two blocks give two upsamplings and end at the image."""
    layers = student_layers(((4, 1), (6, 2)))
    assert [(layer.tap, layer.upsample) for layer in layers] == [
        ("conv2_2", True),
        ("conv2_1", False),
        ("pool1", False),
        ("conv1_1", True),
        ("image", False),
    ]

"""The frozen teacher: its network, its input conventions, and weights read from files."""

import dataclasses
import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import sdn.teacher
from sdn.config import LossWeights, TeacherConfig
from sdn.stages import stage_two_losses
from sdn.student import Student
from sdn.taps import ARCHITECTURES, blocks_of
from sdn.teacher import (
    FastTeacher,
    Teacher,
    empty_teacher,
    file_digest,
    load_weights,
    open_teacher,
    save_teacher,
)

REPOSITORY = Path(__file__).resolve().parents[2]
REAL_WEIGHTS = REPOSITORY.parent / "shared" / "weights" / "vgg16-imagenet-conv.safetensors"
REAL_DIGEST = "929e0e42169ad5efef6e8914af9d703c261364e1441ed9106de49937374eeb65"

VGG11 = TeacherConfig(arch="vgg11", width=0.125, convention="imagenet")
# torchvision's numbers of VGG11's convolutions (configuration A without batch norm).
VGG11_KEYS = {
    "conv1_1": "features.0",
    "conv2_1": "features.3",
    "conv3_1": "features.6",
    "conv3_2": "features.8",
    "conv4_1": "features.11",
    "conv4_2": "features.13",
    "conv5_1": "features.16",
    "conv5_2": "features.18",
}


@pytest.fixture(autouse=True)
def seeded():
    """The same random weights and images in every run."""
    torch.manual_seed(0)


def teacher_of(arch="vgg11", width=0.0625, convention="symmetric"):
    return Teacher(blocks_of(arch, width), convention)


def images(n=2, resolution=32):
    return torch.rand(n, 3, resolution, resolution) * 2 - 1


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before, module):
    after = module.state_dict()
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


class TestNetwork:
    def test_taps_equal_the_network_written_out(self):
        """Convolution and ReLU in blocks, average pooling after each: VGG11 written out here."""
        teacher = teacher_of()
        image = images()
        x, expected = image, {"image": image}
        for block, convolutions in enumerate((1, 1, 2, 2, 2), start=1):
            for i in range(1, convolutions + 1):
                conv = teacher.convs[f"conv{block}_{i}"]
                x = functional.conv2d(x, conv.weight, conv.bias, padding=1).clamp(min=0)
                expected[f"conv{block}_{i}"] = x
            b, c, h, w = x.shape
            x = x.reshape(b, c, h // 2, 2, w // 2, 2).mean(dim=(3, 5))
            expected[f"pool{block}"] = x
        taps = teacher(image)
        assert list(taps) == list(expected)
        for name, tap in taps.items():
            torch.testing.assert_close(tap, expected[name], msg=name)

    @pytest.mark.parametrize("arch", list(ARCHITECTURES))
    def test_pools_are_averages_not_maxima(self, arch):
        """pool{k} is the mean of each 2x2 of conv{k}_{last}, which differs from VGG's maximum."""
        blocks = blocks_of(arch, 0.0625)
        taps = Teacher(blocks, "symmetric")(images())
        for k, (_, convolutions) in enumerate(blocks, start=1):
            conv, pool = taps[f"conv{k}_{convolutions}"], taps[f"pool{k}"]
            quarter = [conv[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
            torch.testing.assert_close(pool, sum(quarter) / 4)
            assert not torch.allclose(pool, functional.max_pool2d(conv, 2))

    @pytest.mark.parametrize(
        ("wanted", "computed"),
        [
            (["image"], []),
            ([], []),
            (["conv1_1"], ["conv1_1"]),
            (["pool1"], ["conv1_1"]),
            (["conv3_1", "image"], ["conv1_1", "conv2_1", "conv3_1"]),
            (["conv3_2", "conv1_1"], ["conv1_1", "conv2_1", "conv3_1", "conv3_2"]),
            (["conv5_2"], list(VGG11_KEYS)),
            (None, list(VGG11_KEYS)),
        ],
    )
    def test_nothing_above_the_deepest_wanted_tap_is_computed(self, wanted, computed):
        """Forward hooks see exactly the convolutions up to the deepest wanted tap, each once."""
        teacher = teacher_of()
        ran = []
        for name, conv in teacher.convs.items():
            conv.register_forward_hook(lambda *_, name=name: ran.append(name))
        taps = teacher(images(), wanted)
        assert ran == computed
        assert set(taps) == set(teacher.names if wanted is None else wanted)

    def test_no_pool_above_the_deepest_wanted_tap(self, monkeypatch):
        """conv2_1 needs one pooling, pool2 a second one."""
        calls = []
        pool = functional.avg_pool2d
        monkeypatch.setattr(
            sdn.teacher.functional, "avg_pool2d", lambda *a: calls.append(1) or pool(*a)
        )
        teacher_of()(images(), ["conv2_1"])
        assert len(calls) == 1
        teacher_of()(images(), ["pool2"])
        assert len(calls) == 3

    def test_wanted_taps_come_in_network_order_and_unchanged(self):
        """A selection gives the same values as all taps do, in the network's order."""
        teacher, image = teacher_of(), images()
        everything = teacher(image)
        some = teacher(image, ["pool4", "image", "conv2_1"])
        assert list(some) == ["image", "conv2_1", "pool4"]
        assert all(torch.equal(some[name], everything[name]) for name in some)


class TestFrozen:
    def test_no_parameter_wants_a_gradient_and_train_does_not_thaw(self):
        """train() on the teacher or on a module around it leaves it in eval mode, frozen."""
        teacher = teacher_of()
        around = nn.ModuleDict({"teacher": teacher, "head": nn.Linear(2, 2)})
        assert around.train().head.training
        assert teacher.train() is teacher
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())

    def test_teacher_is_unchanged_bit_for_bit_by_the_students_training(self):
        """Steps of an optimizer that was even given the teacher change the student alone."""
        teacher = teacher_of()
        student = Student(teacher.blocks, resolution=32, text_dim=8, width=0.01, init="he", seed=1)
        before, started = copy_of(teacher), copy_of(student)
        image, text = images(), torch.randn(2, 8)
        taps = teacher(image)
        optimizer = torch.optim.AdamW(
            [*student.parameters(), *teacher.parameters()], lr=1e-2, weight_decay=0.1
        )
        teacher.train()
        student.train()
        for _ in range(3):
            losses = stage_two_losses(
                student, teacher, text, image, weights=LossWeights(), scales={}
            )
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
        assert same(before, teacher)
        assert all(p.grad is None for p in teacher.parameters())
        assert all(torch.equal(tap, taps[name]) for name, tap in teacher(image).items())
        assert not same(started, student)

    def test_gradients_flow_through_the_frozen_teacher_to_the_image(self):
        """The synthesis gets a gradient from the deepest tap."""
        image = images().requires_grad_()
        teacher_of()(image, ["pool5"])["pool5"].sum().backward()
        assert image.grad is not None
        assert image.grad.abs().sum() > 0


def literal(convention, image):
    """What the first convolution gets, from 8-bit colours: the conventions as published."""
    red, green, blue = ((image[:, c] + 1) / 2 * 255 for c in range(3))
    if convention == "imagenet":
        channels = [
            (red / 255 - 0.485) / 0.229,
            (green / 255 - 0.456) / 0.224,
            (blue / 255 - 0.406) / 0.225,
        ]
    elif convention == "mean-255":
        channels = [red - 123.68, green - 116.779, blue - 103.939]
    elif convention == "release":
        channels = [blue, green, red]
    else:
        channels = [image[:, c] for c in range(3)]
    return torch.stack(channels, dim=1)


@pytest.mark.parametrize("convention", ["imagenet", "mean-255", "release", "symmetric"])
class TestConventions:
    def test_input_equals_the_literal_formula(self, convention):
        """The normalised image is that of the convention's published formula."""
        image = images()
        image[0, :, 0, :3] = torch.tensor([-1.0, 0.0, 1.0])
        came = teacher_of(convention=convention).normalised(image)
        torch.testing.assert_close(came, literal(convention, image), rtol=1e-5, atol=1e-4)

    def test_first_convolution_gets_it_and_the_image_tap_does_not(self, convention):
        """conv1_1 reads the convention's input; tap `image` stays the image in [-1, 1]."""
        teacher, image = teacher_of(convention=convention), images()
        conv = teacher.convs["conv1_1"]
        expected = functional.conv2d(literal(convention, image), conv.weight, conv.bias, padding=1)
        taps = teacher(image, ["image", "conv1_1"])
        torch.testing.assert_close(taps["conv1_1"], expected.clamp(min=0), rtol=1e-4, atol=1e-3)
        assert torch.equal(taps["image"], image)


def test_release_convention_is_bgr_from_0_to_255():
    """A pure red image reaches the release's teacher as (0, 0, 255): no mean is subtracted."""
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    came = teacher_of(convention="release").normalised(red)
    assert came[0, :, 0, 0].tolist() == [0, 0, 255]


def torchvision_tensors():
    """Random weights of a VGG11 of width 0.125 under torchvision's keys, a classifier with them."""
    tensors = {}
    channels_in = 3
    for name, key in VGG11_KEYS.items():
        channels = {"1": 8, "2": 16, "3": 32, "4": 64, "5": 64}[name[4]]
        tensors[f"{key}.weight"] = torch.randn(channels, channels_in, 3, 3)
        tensors[f"{key}.bias"] = torch.randn(channels)
        channels_in = channels
    tensors["classifier.0.weight"] = torch.randn(5, 64)
    tensors["classifier.0.bias"] = torch.randn(5)
    return tensors


def write(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def config_of(path, **changes):
    return dataclasses.replace(VGG11, weights=str(path), **changes)


class TestWeightFiles:
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_torchvision_layout_is_loaded_value_for_value(self, tmp_path, suffix):
        """Each convolution gets exactly the tensors under its torchvision key; it stays frozen."""
        tensors = torchvision_tensors()
        path = write(tmp_path / f"weights{suffix}", tensors)
        teacher = load_weights(config_of(path, sha256=file_digest(path)))
        assert set(teacher.convs) == set(VGG11_KEYS)
        for name, key in VGG11_KEYS.items():
            assert torch.equal(teacher.convs[name].weight, tensors[f"{key}.weight"]), name
            assert torch.equal(teacher.convs[name].bias, tensors[f"{key}.bias"]), name
        assert teacher.convention == "imagenet"
        assert not any(p.requires_grad for p in teacher.parameters())
        assert not teacher.training

    def test_half_precision_weights_are_read_as_float32(self, tmp_path):
        """float16 files give a float32 teacher of the same values."""
        tensors = {key: value.half() for key, value in torchvision_tensors().items()}
        teacher = load_weights(config_of(write(tmp_path / "half.safetensors", tensors)))
        weight = teacher.convs["conv5_2"].weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, tensors["features.18.weight"].float())

    @pytest.mark.parametrize(
        ("arch", "last"), [("vgg11", 18), ("vgg13", 22), ("vgg16", 28), ("vgg19", 34)]
    )
    def test_every_architecture_is_read_from_torchvisions_numbers(self, tmp_path, arch, last):
        """Keys are where convolutions stand among torchvision's layers, ReLU and pools counted."""
        blocks = blocks_of(arch, 0.02)
        layers, channels_in = nn.Sequential(), 3
        for channels, convolutions in blocks:
            for _ in range(convolutions):
                layers.extend([nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU()])
                channels_in = channels
            layers.append(nn.AvgPool2d(2))
        state = nn.ModuleDict({"features": layers}).state_dict()
        assert f"features.{last}.weight" in state
        path = write(tmp_path / "weights.pth", state)
        config = TeacherConfig(arch=arch, width=0.02, convention="symmetric", weights=str(path))
        image = images()
        torch.testing.assert_close(load_weights(config)(image)["pool5"], layers(image))

    def test_digest_may_be_its_beginning(self, tmp_path):
        """The first digits of the SHA-256, as torchvision puts them into names, are enough."""
        path = write(tmp_path / "weights.pth", torchvision_tensors())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert file_digest(path) == digest
        load_weights(config_of(path, sha256=digest[:8]))

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_wrong_digest_is_refused(self, tmp_path, suffix):
        """Another digest than the file's names the file and both digests."""
        path = write(tmp_path / f"weights{suffix}", torchvision_tensors())
        with pytest.raises(ValueError, match=r"weights\..*SHA-256.*expected 0123456789abcdef") as e:
            load_weights(config_of(path, sha256="0123456789abcdef"))
        assert str(path) in str(e.value)
        assert file_digest(path) in str(e.value)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_truncated_file_is_refused(self, tmp_path, suffix):
        """A file cut in half is named; no other error escapes."""
        path = write(tmp_path / f"weights{suffix}", torchvision_tensors())
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match="not a readable weight file") as error:
            load_weights(config_of(path))
        assert str(path) in str(error.value)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_truncated_file_fails_its_digest_first(self, tmp_path, suffix):
        """With a digest configured, a truncated file is recognised before it is read."""
        path = write(tmp_path / f"weights{suffix}", torchvision_tensors())
        digest = file_digest(path)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=f"expected {digest}"):
            load_weights(config_of(path, sha256=digest))

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_missing_keys_name_the_first(self, tmp_path, suffix):
        """Of two missing keys the first in the network's order is named, with its shape."""
        tensors = torchvision_tensors()
        del tensors["features.13.bias"], tensors["features.6.weight"]
        path = write(tmp_path / f"weights{suffix}", tensors)
        with pytest.raises(
            ValueError, match=r"key features\.6\.weight is missing, expected \(32, 16, 3, 3\)"
        ) as error:
            load_weights(config_of(path))
        assert str(path) in str(error.value)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_wrong_shapes_name_the_first_key(self, tmp_path, suffix):
        """Of two wrong shapes the first key is named with both shapes."""
        tensors = torchvision_tensors()
        tensors["features.3.bias"] = torch.zeros(17)
        tensors["features.16.weight"] = torch.zeros(64, 64, 1, 1)
        path = write(tmp_path / f"weights{suffix}", tensors)
        with pytest.raises(
            ValueError, match=r"key features\.3\.bias has shape \(17,\), expected \(16,\)"
        ) as error:
            load_weights(config_of(path))
        assert str(path) in str(error.value)

    def test_weights_of_another_architecture_are_refused(self, tmp_path):
        """VGG11's file does not pass for VGG19: the first key that differs is named."""
        path = write(tmp_path / "weights.pth", torchvision_tensors())
        with pytest.raises(
            ValueError, match=r"does not hold vgg19 of width 0\.125: key features\.2\.weight"
        ):
            load_weights(config_of(path, arch="vgg19"))

    def test_pickle_with_code_is_refused_and_does_not_run(self, tmp_path):
        """A .pth that would run a command when unpickled is refused, and the command never runs."""
        trace = tmp_path / "ran"
        path = tmp_path / "weights.pth"

        class Code:
            def __reduce__(self):
                return os.mkdir, (str(trace),)

        for write_code in (
            lambda: path.write_bytes(pickle.dumps({"features.0.weight": Code()}, protocol=2)),
            lambda: torch.save({"features.0.weight": Code()}, path),
        ):
            write_code()
            with pytest.raises(ValueError, match="not a readable weight file") as error:
                load_weights(config_of(path))
            assert str(path) in str(error.value)
            assert not trace.exists()
        torch.load(path, weights_only=False)  # the trap is armed: read carelessly, it runs
        assert trace.exists()

    def test_a_file_that_holds_no_table_is_refused(self, tmp_path):
        """A .pth of a bare tensor is named, with what it holds."""
        path = tmp_path / "weights.pth"
        torch.save(torch.zeros(3), path)
        with pytest.raises(ValueError, match="holds a Tensor, expected a table") as error:
            load_weights(config_of(path))
        assert str(path) in str(error.value)

    def test_no_such_file(self, tmp_path):
        """A path without a file is named."""
        with pytest.raises(FileNotFoundError, match=r"no weight file at .*absent\.pth"):
            load_weights(config_of(tmp_path / "absent.pth"))

    def test_url_needs_a_digest(self):
        """A URL without SHA-256 is refused when the config is made; with one it is accepted."""
        url = "https://example.org/vgg11.pth"
        with pytest.raises(ValueError, match=r"^sha256 is needed.*example\.org"):
            TeacherConfig(weights=url)
        assert TeacherConfig(weights=url, sha256="0123abcd").weights == url

    def test_digest_of_fewer_than_eight_digits_is_refused(self):
        """A digest too short to tell files apart is refused when the config is made."""
        with pytest.raises(ValueError, match="at least 8 hexadecimal digits"):
            TeacherConfig(weights="weights.pth", sha256="0123abc")

    def test_a_fetched_file_is_held_against_its_digest(self, tmp_path, monkeypatch):
        """A URL is fetched once, kept, and refused where its content has another digest."""
        path = write(tmp_path / "vgg11.pth", torchvision_tensors())
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        good = config_of(path.as_uri(), sha256=file_digest(path)[:12])
        first = load_weights(good)
        with pytest.raises(ValueError, match=r"could not fetch file:.*hash"):
            load_weights(config_of(path.as_uri(), sha256="0123456789ab"))
        path.unlink()
        assert same(copy_of(first), load_weights(good))


def test_saved_teacher_comes_back_bit_for_bit(tmp_path):
    """save_teacher and open_teacher keep blocks, convention and weights; the digest is right."""
    teacher = empty_teacher(TeacherConfig(arch="vgg13", width=0.05, convention="release"))
    path = tmp_path / "teacher.pt"
    assert save_teacher(teacher, path) == hashlib.sha256(path.read_bytes()).hexdigest()
    opened = open_teacher(path)
    assert (opened.blocks, opened.convention) == (teacher.blocks, "release")
    assert same(copy_of(teacher), opened)
    assert not any(p.requires_grad for p in opened.parameters())


@pytest.mark.skipif(
    not REAL_WEIGHTS.is_file(), reason="ImageNet weights of VGG16 are not on this machine"
)
def test_real_vgg16_weights_load_and_respond():
    """VGG16 trained on ImageNet loads from its file, and its taps tell an image from flat grey."""
    teacher = load_weights(
        TeacherConfig(
            arch="vgg16", convention="mean-255", weights=str(REAL_WEIGHTS), sha256=REAL_DIGEST
        )
    )
    stored = load_file(REAL_WEIGHTS)
    assert len(stored) == 26
    assert torch.equal(teacher.convs["conv1_1"].weight, stored["features.0.weight"].float())
    assert torch.equal(teacher.convs["conv5_3"].bias, stored["features.28.bias"].float())
    image = torch.zeros(2, 3, 32, 32)
    image[1, :, :, 16:] = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)
    with torch.no_grad():
        taps = teacher(image)
    assert taps["pool5"].shape == (2, 512, 1, 1)
    for name, tap in taps.items():
        assert torch.isfinite(tap).all(), name
        assert not torch.equal(tap[0], tap[1]), name


@pytest.mark.parametrize("convention", ["imagenet", "mean-255", "release", "symmetric"])
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)]
)
def test_the_fast_teacher_has_the_same_taps(convention, dtype, near):
    """Folded constants and lower precision change rounding alone, at the borders too."""
    teacher = Teacher(blocks_of("vgg11", 0.1), convention)
    generator = torch.Generator().manual_seed(3)
    for name, conv in teacher.convs.items():
        scale = 1 / 127.5 if name == "conv1_1" and convention in {"release", "mean-255"} else 1
        conv.weight.normal_(0, scale * (2 / conv.weight[0].numel()) ** 0.5, generator=generator)
        conv.bias.normal_(0, 0.1, generator=generator)
    image = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    expected, found = teacher(image), FastTeacher(teacher, dtype)(image)
    assert list(found) == list(expected)
    for name, tap in expected.items():
        away = (found[name].float() - tap).norm() / tap.norm()
        assert away < near, name
    assert found["image"] is image


def test_the_fast_teacher_stops_where_it_may(monkeypatch):
    """Only the wanted taps come back, and nothing above the deepest of them is computed."""
    teacher = FastTeacher(Teacher(blocks_of("vgg11", 0.1), "symmetric"), torch.float32)
    for name in ("conv3_1", "conv4_1"):
        monkeypatch.setattr(teacher.convs[name], "forward", lambda x: pytest.fail("computed"))
    assert list(teacher(torch.zeros(1, 3, 32, 32), ("image", "pool2"))) == ["image", "pool2"]


def test_the_fast_teacher_is_frozen_and_leaves_the_other_alone():
    """Its parameters want no gradient, gradients flow to the image, the original stays."""
    teacher = Teacher(blocks_of("vgg11", 0.1), "release")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    fast = FastTeacher(teacher, torch.float32)
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    fast(image)["pool3"].sum().backward()
    assert image.grad is not None
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())

"""Feature networks: what they say of themselves, and that an image's vector is its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from sdn.config import EvaluationConfig, TeacherConfig
from sdn.features.networks import Lite0, TeacherFeatures, open_network
from sdn.metrics import tap_features
from sdn.stage_run import TEACHER
from sdn.teacher import empty_teacher, file_digest, open_teacher, save_teacher


def pixels(n, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a narrow teacher with random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    found = empty_teacher(TeacherConfig(arch="vgg11", width=0.05, convention="symmetric"))
    for conv in found.convs.values():
        torch.nn.init.normal_(conv.weight, 0, (2 / conv.weight[0].numel()) ** 0.5)
    save_teacher(found, folder / TEACHER)
    return folder


@pytest.fixture(scope="module")
def lite0():
    """The packaged network at a small size."""
    return Lite0(64)


@pytest.fixture(params=["teacher", "lite0"])
def network(request, teacher, lite0):
    return (
        lite0
        if request.param == "lite0"
        else open_network(EvaluationConfig(features="teacher"), teacher)
    )


def test_shapes_are_those_told(network):
    """Features and logits are float32 of the widths that the network names."""
    features, logits = network(pixels(3))
    assert features.shape == (3, network.dim)
    assert logits.shape == (3, network.classes)
    assert features.dtype == logits.dtype == torch.float32
    assert len(network.digest) == 64
    assert features.isfinite().all()


def test_a_vector_does_not_depend_on_its_neighbours(network):
    """An image among others has the vector it has alone; another image has another."""
    several, _ = network(pixels(5))
    alone, _ = network(pixels(5)[3:4])
    torch.testing.assert_close(alone[0], several[3], rtol=1e-4, atol=1e-4)
    assert (several[3] - several[2]).abs().max() > 1e-2


def test_networks_are_frozen(network):
    """Nothing of them is trained, and nothing in them changes by being asked."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(pixels(3))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_the_teachers_features_are_its_pools(teacher):
    """The run's teacher gives what the captions stage fits against, and has no classes."""
    network = TeacherFeatures(teacher / TEACHER)
    features, logits = network(pixels(4, 64))
    torch.testing.assert_close(
        features, tap_features(open_teacher(teacher / TEACHER), pixels(4, 64))
    )
    assert logits.shape == (4, 0)
    assert network.digest == file_digest(teacher / TEACHER)
    assert (network.name, network.size, network.classes) == ("teacher", 0, 0)


def test_lite0_sees_images_as_it_was_trained(lite0):
    """Pixels arrive as (x - 127) / 128, bicubic at its own size; its head sees the features."""
    seen = []
    handle = lite0.network._conv_stem.register_forward_pre_hook(lambda _, found: seen.extend(found))
    try:
        features, logits = lite0(pixels(2, 64))
        small, _ = lite0(pixels(2, 32))
    finally:
        handle.remove()
    torch.testing.assert_close(seen[0][:, :, :64, :64], (pixels(2, 64).float() - 127) / 128)
    larger = functional.interpolate(pixels(2, 32).float(), (64, 64), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen[1][:, :, :64, :64], (larger - 127) / 128)
    torch.testing.assert_close(lite0.network._fc(features.clone()), logits.clone())
    assert (small - features).abs().max() > 1e-2


def test_lite0_knows_what_it_sees(lite0):
    """Flat and noisy pictures are classified apart, and the same ones always alike."""
    flat = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)
    classes = [lite0(image)[1].argmax().item() for image in (flat, pixels(1, 64), flat)]
    assert classes[0] == classes[2] != classes[1]


def test_configured_network_is_opened(teacher, monkeypatch):
    """Each name of the config opens its network with its settings."""
    assert open_network(EvaluationConfig(features="teacher"), teacher).name == "teacher"
    found = open_network(EvaluationConfig(features_size=96), teacher)
    assert (found.name, found.size) == ("lite0", 96)
    asked = []
    monkeypatch.setattr("sdn.features.inception.open_inception", lambda *a: asked.append(a))
    config = EvaluationConfig(features="inception", inception="x.pth", inception_sha256="1" * 8)
    open_network(config, teacher)
    assert asked == [("x.pth", "1" * 8)]


def test_missing_packages_are_named(monkeypatch):
    """Without its packages the error says what to install, or to set instead."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModuleNotFoundError, match=r"sdn\[pipeline\].*evaluation.features=teacher"):
        Lite0()


def test_missing_teacher_is_named(tmp_path):
    """A folder without a teacher is an error that names the file."""
    with pytest.raises(FileNotFoundError, match=TEACHER):
        open_network(EvaluationConfig(features="teacher"), Path(tmp_path))

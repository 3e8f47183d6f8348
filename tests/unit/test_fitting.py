"""The two stages before distillation, from folders to folders."""

import dataclasses
import json
import re

import pytest
import tiny_data
import torch

import sdn.fitting
from sdn.captions import open_encoder
from sdn.config import CaptionConfig, TeacherConfig
from sdn.data.images import encode
from sdn.data.loader import load_split
from sdn.fitting import write_captions, write_teacher
from sdn.sampling import ENCODER
from sdn.stage_run import TAP_MEANS, TEACHER
from sdn.teacher import empty_teacher, file_digest, open_teacher, save_teacher

CONFIG = TeacherConfig(
    arch="vgg11", width=0.05, convention="symmetric", epochs=3, batch=8, rate=5e-3
)
COLOURS = {"red": 0, "green": 1, "blue": 2}
CAPTIONS = CaptionConfig(dim=6, width=8, max_chars=40, epochs=2, batch=8, even=True)


def coloured(number, split):
    """Noise in which one channel is bright; its name is the label and stands in the caption."""
    name = list(COLOURS)[number % 3]
    pixels = tiny_data.picture(number) // 4
    pixels[:, :, COLOURS[name]] += 150
    return tiny_data.record(
        number,
        split,
        captions=(f"a {name} thing, number {number}",),
        image=encode(pixels, "png"),
        labels={"colour": name},
    )


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    """The number of threads as it was, and no measuring of what is faster here."""
    monkeypatch.setattr(sdn.fitting, "choose_precision", lambda wanted, device: "float32")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images to train on and 6 to validate on."""
    folder = tmp_path_factory.mktemp("data")
    tiny_data.write(folder, [coloured(n, "train" if n < 24 else "validation") for n in range(30)])
    return folder


@pytest.fixture
def weights(tmp_path):
    """A weight file in torchvision's layout, and the teacher that it holds."""
    torch.manual_seed(1)
    teacher = empty_teacher(CONFIG)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    places = ("0", "3", "6", "8", "11", "13", "16", "18")
    table = {
        f"features.{place}.{part}": getattr(conv, part).detach().clone()
        for place, conv in zip(places, teacher.convs.values(), strict=True)
        for part in ("weight", "bias")
    }
    torch.save(table, tmp_path / "weights.pth")
    return tmp_path / "weights.pth", teacher


def mean_activations(teacher, pixels):
    taps = teacher(pixels.float() / 127.5 - 1)
    return {name: float(tap.abs().double().mean()) for name, tap in taps.items()}


def test_fitted_teacher_is_written_with_its_means(data, tmp_path):
    """The file opens as the teacher; the means are those of every tap over all training images."""
    reports = []
    result = write_teacher(
        tmp_path, data, CONFIG, report=lambda share, text: reports.append((share, text))
    )
    teacher = open_teacher(tmp_path / TEACHER)
    means = json.loads((tmp_path / TAP_MEANS).read_text())
    assert tuple(means) == teacher.names
    assert means == pytest.approx(mean_activations(teacher, load_split(data, "train").pixels), 1e-4)
    assert result["fitted"] is True
    assert result["sha256"] == file_digest(tmp_path / TEACHER)
    assert result["classes"] == {"colour": 3}
    assert len(reports) == 3  # the last of 9 steps, what comes after them, and the accuracy
    assert re.fullmatch(r"looks at \d+ images", reports[1][1])
    assert reports[-1][1].startswith("accuracy colour ")
    shares = [share for share, _ in reports]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert "loss" in reports[0][1]


def test_accuracy_is_of_images_that_were_not_fitted_on(data, tmp_path, monkeypatch):
    """The accuracy is measured on the validation split, and on training where there is none."""
    seen = []
    measure = sdn.fitting.head_accuracy

    def watching(model, pixels, targets):
        seen.append((pixels, targets))
        return measure(model, pixels, targets)

    monkeypatch.setattr(sdn.fitting, "head_accuracy", watching)
    first = write_teacher(tmp_path, data, CONFIG)
    pixels, targets = seen[0]
    held = load_split(data, "validation")
    assert torch.equal(pixels, held.pixels)
    names = targets.classes["colour"]
    assert [names[i] for i in targets.values["colour"]] == [s["colour"] for s in held.labels]
    assert 0 <= first["accuracy"]["colour"] <= 1

    bare = tmp_path / "bare"
    tiny_data.write(bare, [coloured(n, "train") for n in range(12)])
    write_teacher(tmp_path, bare, CONFIG)
    assert len(seen[1][0]) == 12


def test_accuracy_is_of_some_images_spread_over_the_split(tmp_path, monkeypatch):
    """Of many it would take as long as the fit; classes are those of the images that are asked."""
    seen = []
    monkeypatch.setattr(
        sdn.fitting, "head_accuracy", lambda _, *asked: seen.append(asked) or {"colour": 1.0}
    )
    tiny_data.write(tmp_path / "data", [coloured(n, "train") for n in range(12)])
    write_teacher(tmp_path, tmp_path / "data", CONFIG)
    monkeypatch.setattr(sdn.fitting, "_JUDGED", 4)
    write_teacher(tmp_path, tmp_path / "data", CONFIG)
    (pixels, targets), (fewer, of_fewer) = seen
    assert torch.equal(fewer, pixels[[0, 3, 6, 9]])
    assert torch.equal(of_fewer.values["colour"], targets.values["colour"][[0, 3, 6, 9]])


def test_fitting_reads_the_training_split_only(data, tmp_path):
    """Other validation images leave the fitted weights bit for bit the same."""
    other = tmp_path / "other"
    tiny_data.write(
        other,
        [coloured(n, "train") for n in range(24)]
        + [coloured(n, "validation") for n in range(90, 96)],
    )
    found = []
    for name, folder in (("a", data), ("b", other)):
        (tmp_path / name).mkdir()
        write_teacher(tmp_path / name, folder, CONFIG)
        found.append(open_teacher(tmp_path / name / TEACHER).state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_given_weights_are_loaded_and_not_fitted(data, tmp_path, weights):
    """With a weight file the teacher is that file's, measured on this data set."""
    path, expected = weights
    config = TeacherConfig(
        arch="vgg11", width=0.05, convention="mean-255", weights=str(path), sha256=file_digest(path)
    )
    result = write_teacher(tmp_path, data, config)
    teacher = open_teacher(tmp_path / TEACHER)
    assert teacher.convention == "mean-255"
    state = expected.state_dict()
    assert all(torch.equal(value, state[k]) for k, value in teacher.state_dict().items())
    assert result == {"fitted": False, "sha256": file_digest(tmp_path / TEACHER)}
    means = json.loads((tmp_path / TAP_MEANS).read_text())
    assert means == pytest.approx(mean_activations(teacher, load_split(data, "train").pixels), 1e-4)


def test_a_teacher_that_has_seen_no_image(data, tmp_path):
    """With no epochs nothing is fitted; its weights are those of its seed, and its taps live."""
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        config = dataclasses.replace(CONFIG, epochs=0, seed=seed)
        result = write_teacher(tmp_path / name, data, config)
        assert result["fitted"] is False
        found.append(open_teacher(tmp_path / name / TEACHER).state_dict())
        means = json.loads((tmp_path / name / TAP_MEANS).read_text())
        assert min(means.values()) > 0.01
    same, other = ([torch.equal(found[0][k], one[k]) for k in found[0]] for one in found[1:])
    assert all(same)
    assert not all(other)


def test_wrong_weights_write_nothing(data, tmp_path, weights):
    """A weight file that is refused leaves no teacher behind."""
    folder = tmp_path / "out"
    folder.mkdir()
    config = TeacherConfig(arch="vgg11", width=0.05, weights=str(weights[0]), sha256="0" * 64)
    with pytest.raises(ValueError, match=r"weights\.pth has SHA-256"):
        write_teacher(folder, data, config)
    assert list(folder.iterdir()) == []


def test_weights_that_are_fed_wrongly_write_nothing(data, tmp_path, weights, monkeypatch):
    """The convention is looked at with the training images, before the teacher is written."""
    seen = []

    def refusing(teacher, pixels):
        seen.append((teacher, pixels))
        raise ValueError("alike")

    monkeypatch.setattr(sdn.fitting, "check_convention", refusing)
    folder = tmp_path / "out"
    folder.mkdir()
    config = TeacherConfig(arch="vgg11", width=0.05, weights=str(weights[0]))
    with pytest.raises(ValueError, match="alike"):
        write_teacher(folder, data, config)
    assert list(folder.iterdir()) == []
    ((teacher, pixels),) = seen
    assert teacher.convention == "imagenet"
    assert torch.equal(pixels, load_split(data, "train").pixels)


def test_caption_encoder_is_fitted_written_and_repeatable(data, tmp_path):
    """The written encoder opens, has the configured size, and the same inputs give it again."""
    folders = [tmp_path / name for name in ("a", "b")]
    torch.manual_seed(3)
    teacher = empty_teacher(CONFIG)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    save_teacher(teacher, tmp_path / TEACHER)
    for folder in folders:
        folder.mkdir()
        reports = []
        result = write_captions(
            folder,
            data,
            tmp_path,
            CAPTIONS,
            report=lambda *told, reports=reports: reports.append(told),
        )
        assert result == {"probes": {}}  # neither tone nor gender is labelled
        count = len(load_split(data, "train").keys)
        assert reports[0] == (0.0, f"the teacher has read {count} of {count} images")
        assert reports[-1][0] == 1
    one, two = (open_encoder(folder / ENCODER) for folder in folders)
    captions = ["a red thing, number 0", "something blue"]
    assert one.encode(captions).shape == (2, 6)
    assert torch.equal(one.encode(captions), two.encode(captions))
    spread = one.encode([found[0] for found in load_split(data, "train").captions])
    assert spread.mean(0).abs().max() < 1e-3  # evened out over the training captions

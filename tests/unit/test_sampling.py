"""A finished model: written, opened, and drawing."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdn.captions import new_encoder, save_encoder
from sdn.config import CaptionConfig, DataConfig, RunConfig, StudentConfig, TeacherConfig
from sdn.sampling import (
    ENCODER,
    STUDENT,
    Synthesizer,
    encode_png,
    open_student,
    open_synthesizer,
    save_synthesizer,
)
from sdn.stage_run import new_student, write_model
from sdn.student import Student
from sdn.taps import blocks_of
from sdn.teacher import channels_last
from sdn.tensor_files import read_tensors, write_tensors

WIDTH = 0.05
CAPTIONS = ("a red house", "Cook: dark skin tone", "two dogs", "keycap 5", "x")


def model(noise=0):
    """A tiny synthesizer with weights that draw something."""
    student = Student(
        blocks_of("vgg11", WIDTH),
        resolution=32,
        text_dim=8,
        width=WIDTH,
        noise=noise,
        init="he",
        seed=1,
    )
    encoder = new_encoder(CaptionConfig(dim=8, width=8, max_chars=40))
    encoder.requires_grad_(requires_grad=False).eval()
    return Synthesizer(encoder=encoder, student=student.eval(), resolution=32, max_chars=40)


def save(synthesizer, folder):
    student = synthesizer.student
    settings = {
        "blocks": [list(block) for block in student.blocks],
        "resolution": 32,
        "text_dim": 8,
        "width": WIDTH,
    }
    save_synthesizer(folder, synthesizer.encoder, student.state_dict(), settings, 40)


def test_pixels():
    """One uint8 RGB image a caption, and captions that differ give images that differ."""
    found = model()(CAPTIONS)
    assert found.shape == (5, 3, 32, 32)
    assert found.dtype == torch.uint8
    assert not torch.equal(found[0], found[1])
    assert len(found.unique()) > 2


def test_a_model_that_departs_from_its_teacher_is_read_back(tmp_path):
    """The folder says how the student is made; it draws what the student drew that was written."""
    config = RunConfig(
        name="narrow",
        data=DataConfig(resolution=32),
        teacher=TeacherConfig(arch="vgg11", width=0.1),
        student=StudentConfig(
            init="he",
            width=0.5,
            noise=3,
            noise_scale=1.5,
            condition="levels",
            leak=0.2,
            chroma=4,
        ),
        captions=CaptionConfig(dim=8, width=8, max_chars=40),
    )
    for name in ("captions", "model"):
        (tmp_path / name).mkdir()
    save_encoder(new_encoder(config.captions), tmp_path / "captions" / ENCODER)
    student = new_student(config)
    torch.manual_seed(0)
    for layer in student.levels.values():
        torch.nn.init.normal_(layer.weight, 0, 0.1)
    write_model(tmp_path / "model", config, tmp_path / "captions", student.state_dict())
    opened = open_synthesizer(tmp_path / "model")
    assert opened.student.blocks == blocks_of("vgg11", WIDTH)
    drawing = channels_last(student.eval())
    given = Synthesizer(
        encoder=opened.encoder, student=drawing, resolution=32, max_chars=40, noise_scale=1.5
    )
    assert torch.equal(opened(CAPTIONS), given(CAPTIONS))


def test_the_noise_scale_is_the_models_or_that_of_a_call():
    """0 draws one image whatever the seed; a scale moves images as far; outside it is refused."""
    plain = model(noise=8)
    wide = dataclasses.replace(plain, noise_scale=2.0)
    assert torch.equal(plain(CAPTIONS, seed=3, noise_scale=2.0), wide(CAPTIONS, seed=3))
    assert torch.equal(wide(CAPTIONS, noise_scale=1.0), plain.of_data(CAPTIONS))
    still = plain(CAPTIONS, noise_scale=0.0)
    assert torch.equal(still, plain(CAPTIONS, seed=5, noise_scale=0.0))
    moved = [(one(CAPTIONS, seed=3).float() - still.float()).abs().mean() for one in (plain, wide)]
    assert 0 < moved[0] < moved[1]
    for scale in (-0.1, 3.1, float("nan")):
        with pytest.raises(ValueError, match="noise scale must be 0 to 3, not"):
            plain(CAPTIONS, noise_scale=scale)


def test_a_model_from_before_noise_scales_draws_with_that_of_training(tmp_path):
    """Its folder names none; one that names an impossible scale is damaged."""
    save(model(), tmp_path)
    assert open_synthesizer(tmp_path).noise_scale == 1
    weights, settings = read_tensors(tmp_path / STUDENT)
    write_tensors(tmp_path / STUDENT, weights, settings | {"noise_scale": 50})
    with pytest.raises(ValueError, match=r"student\.safetensors is .*noise scale must be 0 to 3"):
        open_synthesizer(tmp_path)


def test_save_and_open_give_identical_pixels(tmp_path):
    """The opened model draws the very pixels that the saved one drew, and is frozen."""
    saved = model()
    save(saved, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {STUDENT, ENCODER}
    opened = open_synthesizer(tmp_path)
    assert torch.equal(opened(CAPTIONS), saved(CAPTIONS))
    assert torch.equal(opened(CAPTIONS), opened(CAPTIONS))
    assert (opened.resolution, opened.max_chars) == (32, 40)
    assert not opened.student.training
    assert not opened.encoder.training
    parameters = [*opened.student.parameters(), *opened.encoder.parameters()]
    assert not any(parameter.requires_grad for parameter in parameters)


def test_opened_student_can_be_trained_on(tmp_path):
    """`open_student` gives the saved weights with gradients."""
    saved = model()
    save(saved, tmp_path)
    student = open_student(tmp_path)
    for name, value in saved.student.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_neither_company_nor_threads_change_an_image(threads):
    """Alone or in any company, with any number of threads, a caption draws the same bytes."""
    synthesizer = model()
    wanted = dict(zip(CAPTIONS, synthesizer(CAPTIONS), strict=True))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for some in (CAPTIONS, CAPTIONS[::-1], CAPTIONS[1:3], *([one] for one in CAPTIONS)):
            for caption, pixels in zip(some, synthesizer(some), strict=True):
                assert encode_png(pixels) == encode_png(wanted[caption])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_another_process_draws_the_same_bytes(tmp_path):
    """A fresh process that opens the model, with more threads, writes the same files."""
    save(model(), tmp_path)
    code = (
        "import sys, torch; from pathlib import Path; from sdn.sampling import *;"
        "torch.set_num_threads(2);"
        "sys.stdout.buffer.write(b''.join(map(encode_png, open_synthesizer(Path(sys.argv[1]))"
        "(sys.argv[2:]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *CAPTIONS],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == b"".join(map(encode_png, model()(CAPTIONS)))


def test_the_faithful_student_has_no_noise():
    """The seed is taken and changes nothing; the model says so."""
    synthesizer = model()
    assert not synthesizer.noise
    assert torch.equal(synthesizer(CAPTIONS, seed=5), synthesizer(CAPTIONS))
    assert torch.equal(synthesizer.of_data(CAPTIONS, seed=5), synthesizer(CAPTIONS))


def test_a_seed_is_an_image_wherever_it_is_drawn():
    """Noise hangs on the caption as it is read, and on no last bit of its embedding.

    Another processor rounds otherwise, and would draw another image altogether.
    """
    here, elsewhere = model(noise=6), model(noise=6)
    with torch.no_grad():
        elsewhere.encoder.out.bias.mul_(1 + 1e-6)
    text = [synthesizer.encoder.encode(["a red house"]) for synthesizer in (here, elsewhere)]
    assert not torch.equal(*text)

    def apart(one, other):
        return float((one.float() - other.float()).abs().mean())

    drawn = here(["a red house"], seed=3)
    assert apart(elsewhere(["a red house"], seed=3), drawn) < 0.1
    assert apart(here(["a red house"], seed=4), drawn) > 1
    assert torch.equal(here(["A red HOUSE!"], seed=3), drawn)


def test_png_holds_pixels_and_text():
    """A PNG file gives back the very pixels and its text; without text it has none."""
    (pixels,) = model()(["a red house"])
    plain, named = encode_png(pixels), encode_png(pixels, {"sdn:caption": "ein größerer Käfer"})
    assert plain == encode_png(pixels) != named
    for data, text in ((plain, {}), (named, {"sdn:caption": "ein größerer Käfer"})):
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert np.array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())
            assert image.text == text


def test_spelling_does_not_change_the_image():
    """A caption written another way is the same picture."""
    synthesizer = model()
    found = synthesizer(["Santa Claus: dark skin tone", "santa  claus - dark skin tone"])
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("caption", "error", "text"),
    [
        ("", ValueError, "no letter or digit"),
        ("y" * 41, ValueError, "at most 40"),
        (3, TypeError, "must be text"),
    ],
)
def test_impossible_captions_are_refused(caption, error, text):
    """One caption that no picture can be made of stops the whole list before any is drawn."""
    with pytest.raises(error, match=f"number 2 of 2: .*{text}"):
        model()(["a fine caption", caption])
    with pytest.raises(error, match=text) as alone:
        model()([caption])
    assert "number" not in str(alone.value)


@pytest.mark.parametrize(("captions", "error"), [([], ValueError), ("a red house", TypeError)])
def test_no_list_of_captions(captions, error):
    """Nothing, and one text in place of a list, are refused."""
    with pytest.raises(error, match="expected"):
        model()(captions)


@pytest.mark.parametrize("missing", [STUDENT, ENCODER])
def test_incomplete_folder(tmp_path, missing):
    """A folder without one of the two files holds no model, and the text names folder and file."""
    save(model(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no model: {missing} is missing"):
        open_synthesizer(tmp_path)


@pytest.mark.parametrize("name", [STUDENT, ENCODER])
@pytest.mark.parametrize("damage", ["cut", "empty", "other", "shape", "missing", "settings"])
def test_damaged_files_are_named(tmp_path, name, damage):
    """A file that is cut off, something else, or incomplete is a ValueError that names it."""
    save(model(), tmp_path)
    path = tmp_path / name
    tensors, settings = read_tensors(path)
    first = next(iter(tensors))
    if damage in {"cut", "empty"}:
        path.write_bytes(path.read_bytes()[:-20] if damage == "cut" else b"")
    elif damage == "other":
        save_file(tensors, path)
    elif damage == "shape":
        write_tensors(path, tensors | {first: torch.zeros(1)}, settings)
    elif damage == "missing":
        del tensors[first]
        write_tensors(path, tensors, settings)
    else:
        write_tensors(path, tensors, {"max_chars": 40})
    with pytest.raises(ValueError, match=f"{name} is not a whole model file"):
        open_synthesizer(tmp_path)


def test_the_same_model_gives_the_same_file(tmp_path):
    """Writing a model twice gives equal bytes, so that its digest names it."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        save(model(), tmp_path / folder)
    for name in (STUDENT, ENCODER):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_wrong_folder(tmp_path):
    """A folder that does not exist holds no model."""
    with pytest.raises(FileNotFoundError, match="elsewhere holds no model"):
        open_synthesizer(tmp_path / "elsewhere")


def test_long_captions_of_data_are_cut_as_in_training():
    """What generation refuses as too long is drawn from its beginning where the data have it."""
    synthesizer = model()
    caption = "a red bird " * 20
    with pytest.raises(ValueError, match="reads at most 40"):
        synthesizer([caption])
    assert torch.equal(synthesizer.of_data([caption]), synthesizer.of_data([caption + "cut off"]))
    assert torch.equal(synthesizer.of_data(["a cat"]), synthesizer(["a cat"]))

"""A finished model: written, opened, and drawing."""

from __future__ import annotations

import pytest
import torch

from sdn.captions import new_encoder
from sdn.config import CaptionConfig
from sdn.sampling import (
    ENCODER,
    STUDENT,
    Synthesizer,
    open_student,
    open_synthesizer,
    save_synthesizer,
)
from sdn.student import Student
from sdn.taps import blocks_of

WIDTH = 0.05
CAPTIONS = ("a red house", "Cook: dark skin tone", "two dogs", "keycap 5", "x")


def model():
    """A tiny synthesizer with weights that draw something."""
    student = Student(
        blocks_of("vgg11", WIDTH), resolution=32, text_dim=8, width=WIDTH, init="he", seed=1
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


def test_batches_do_not_change_the_images():
    """However many captions are drawn at a time, each image is the same up to rounding."""
    synthesizer = model()
    together = synthesizer(CAPTIONS).int()
    for batch in (1, 2, 3):
        assert (synthesizer(CAPTIONS, batch=batch).int() - together).abs().max() <= 1


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
    with pytest.raises(error, match=text):
        model()(["a fine caption", caption])


@pytest.mark.parametrize("missing", [STUDENT, ENCODER])
def test_incomplete_folder(tmp_path, missing):
    """A folder without one of the two files holds no model, and the text names folder and file."""
    save(model(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no model: {missing} is missing"):
        open_synthesizer(tmp_path)


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

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from registered_model import CONFIG, write_small_model

from pipelines.digests import folder_digest
from pipelines.generation import FoundModel, draw, find_model, write_images
from pipelines.registry import RegistryError
from sdn.config import StudentConfig
from sdn.sampling import STUDENT

MODEL = FoundModel(folder=Path(), name="m", version="1", uri="models:/m/1", sha256="abc")


def pixels(count, side=8):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_single_image_into_a_named_file(tmp_path):
    """One caption and a .png name give that file, with exactly those pixels and its metadata."""
    drawn = pixels(1)
    path = tmp_path / "new" / "bird.png"
    found = write_images(drawn, ["a bird"], path, model=MODEL, seed=7)
    assert found == [path]
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), drawn[0].permute(1, 2, 0).numpy())
        text = dict(image.text)
    assert text == {
        "sdn:model": "m",
        "sdn:version": "1",
        "sdn:uri": "models:/m/1",
        "sdn:caption": "a bird",
        "sdn:seed": "7",
        "sdn:sha256": "abc",
    }


def test_several_captions_into_a_folder(tmp_path):
    """Each caption gives a file named after it, in order, with its own pixels."""
    drawn = pixels(3)
    captions = ["A red   Bird!", "a red cat", "two / three"]
    found = write_images(drawn, captions, tmp_path / "out", model=MODEL, seed=0)
    names = ["a-red-bird.png", "a-red-cat.png", "two-three.png"]
    assert found == [tmp_path / "out" / name for name in names]
    for n, path in enumerate(found):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), drawn[n].permute(1, 2, 0).numpy())
            assert image.text["sdn:caption"] == captions[n]


def test_several_images_of_each_caption(tmp_path):
    """Each has its seed in its name and its metadata; those of a caption stand together."""
    found = write_images(pixels(4), ["a bird", "a cat"], tmp_path, model=MODEL, seed=5, each=2)
    names = ["a-bird-seed-5.png", "a-bird-seed-6.png", "a-cat-seed-5.png", "a-cat-seed-6.png"]
    assert [path.name for path in found] == names
    for path, seed in zip(found, ("5", "6", "5", "6"), strict=True):
        with Image.open(path) as image:
            assert image.text["sdn:seed"] == seed


def test_captions_of_one_name_and_several_seeds(tmp_path):
    """The caption is numbered, not the image; another seed overwrites nothing."""
    captions = ["a bird", "A bird!"]
    found = write_images(pixels(4), captions, tmp_path, model=MODEL, seed=0, each=2)
    names = ["a-bird-seed-0", "a-bird-seed-1", "a-bird-1-seed-0", "a-bird-1-seed-1"]
    assert [path.stem for path in found] == names
    once = write_images(pixels(1), ["a cat"], tmp_path, model=MODEL, seed=0)
    again = write_images(pixels(1), ["a cat"], tmp_path, model=MODEL, seed=2)
    assert [path.name for path in once + again] == ["a-cat.png", "a-cat-seed-2.png"]


def test_several_images_do_not_go_into_one_file(tmp_path):
    """Of a caption or of several: the text names the file and what to give instead."""
    out = tmp_path / "bird.png"
    for captions, each in ((["a bird"], 2), (["a bird", "a cat"], 1)):
        with pytest.raises(ValueError, match=r"bird\.png names one file, but 2 images.*a folder"):
            write_images(pixels(2), captions, out, model=MODEL, seed=0, each=each)
    assert not out.exists()


@pytest.mark.parametrize("name", ["bird.jpg", "notes"])
def test_what_is_no_png_and_no_folder_is_refused(tmp_path, name):
    """Another kind of image is not taken for a folder's name, nor is a file that is there."""
    out = tmp_path / name
    if name == "notes":
        out.write_text("kept")
    with pytest.raises(ValueError, match=rf"written as PNG: .*{name} must end in \.png, or be a f"):
        write_images(pixels(1), ["a bird"], out, model=MODEL, seed=0)
    assert not out.is_dir()


def test_images_of_a_caption_follow_their_seeds(tmp_path):
    """Each is the one that its seed draws alone; a model without noise says that it has one."""
    noise = dataclasses.replace(CONFIG, student=StudentConfig(init="he", noise=4))
    noisy = write_small_model(tmp_path / "noisy", noise)
    drawn = draw(noisy, ["a bird", "a cat"], seed=3, each=2)
    alone = [draw(noisy, [caption], seed=n) for caption in ("a bird", "a cat") for n in (3, 4)]
    assert torch.equal(drawn, torch.cat(alone))
    assert not torch.equal(drawn[0], drawn[1])
    plain = write_small_model(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no noise.*leave --each out"):
        draw(plain, ["a bird"], each=2)


def test_another_noise_scale_is_another_image(tmp_path):
    """It has its own name and says so in its metadata; a model without noise has no such thing."""
    noise = dataclasses.replace(CONFIG, student=StudentConfig(init="he", noise=4, noise_scale=2))
    noisy = write_small_model(tmp_path / "noisy", noise)
    own, same, less = (draw(noisy, ["a bird"], noise_scale=scale) for scale in (None, 2.0, 0.5))
    assert torch.equal(own, same)
    assert not torch.equal(own, less)
    write_images(own, ["a bird"], tmp_path, model=MODEL, seed=0)
    (path,) = write_images(less, ["a bird"], tmp_path, model=MODEL, seed=0, noise_scale=0.5)
    assert (tmp_path / "a-bird.png").exists()
    assert path.name == "a-bird-noise-0.5.png"
    with Image.open(path) as image:
        assert image.text["sdn:noise_scale"] == "0.5"
    plain = write_small_model(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no noise: leave --noise-scale out"):
        draw(plain, ["a bird"], noise_scale=0.5)


@pytest.mark.parametrize(
    "captions",
    [
        ["a bird", "a bird", "a bird"],
        ["a bird", "A bird.", "a bird"],
        ["a bird-2", "a cat", "a bird", "a bird"],
        ["a bird-2", "a bird", "a bird"],
    ],
)
def test_same_caption_twice(tmp_path, captions):
    """Captions of the same name give files of their own; none is overwritten."""
    drawn = pixels(len(captions))
    found = write_images(drawn, captions, tmp_path, model=MODEL, seed=0)
    assert len(set(found)) == len(captions)
    for n, path in enumerate(found):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), drawn[n].permute(1, 2, 0).numpy())


def test_names_of_odd_captions(tmp_path):
    """Signs become `image`, long captions are cut, umlauts stay, nothing leaves the folder."""
    captions = ["!?", "x" * 300, "ein größerer Käfer", "../../etc/passwd"]
    found = write_images(pixels(4), captions, tmp_path, model=MODEL, seed=0)
    names = ["image.png", "x" * 60 + ".png", "ein-größerer-käfer.png", "etc-passwd.png"]
    assert [path.name for path in found] == names
    assert all(path.parent == tmp_path for path in found)
    with Image.open(found[2]) as image:
        assert image.text["sdn:caption"] == captions[2]


def test_without_out_into_the_current_folder(tmp_path, monkeypatch):
    """Without a place, the image lands where the person stands."""
    monkeypatch.chdir(tmp_path)
    (found,) = write_images(pixels(1), ["a bird"], None, model=MODEL, seed=0)
    assert (tmp_path / "a-bird.png").is_file()
    assert found.resolve() == tmp_path / "a-bird.png"


def test_model_folder_needs_no_registry(tmp_path):
    """A folder with a student is a model, whatever the registry knows."""
    (tmp_path / STUDENT).write_bytes(b"")
    found = find_model(str(tmp_path), None)
    assert (found.folder, found.name, found.version) == (tmp_path, tmp_path.name, "")
    assert found.uri == found.title == str(tmp_path)
    assert found.sha256 == folder_digest(tmp_path)


def test_nothing_registered(tmp_path):
    """Without a champion the text says how to get one or name another."""
    with pytest.raises(RegistryError, match="nothing is registered") as caught:
        find_model(None, str(tmp_path / "store"))
    for word in (str(tmp_path / "store"), "sdn run", "--model", "--store"):
        assert word in str(caught.value)

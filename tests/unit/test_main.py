"""`python -m sdn`: the whole chain in one process with torch alone, from folder to folder."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sdn.__main__ import STEPS, main
from sdn.checkpoint import Checkpoints
from sdn.data.files import LocalFolder
from sdn.data.images import encode
from sdn.sampling import ENCODER, STUDENT, encode_png, open_student, open_synthesizer

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}
SMALL = {
    "data.resolution": 32,
    "data.validation_share": 0.2,
    "data.test_share": 0.2,
    "data.image_format": "png",
    "teacher.arch": "vgg11",
    "teacher.width": 0.04,
    "teacher.epochs": 1,
    "teacher.batch": 8,
    "captions.dim": 8,
    "captions.width": 8,
    "captions.epochs": 1,
    "captions.batch": 8,
    "workers": 1,
    "stage_one.epochs": 1,
    "stage_two.epochs": 1,
    "stage_one.global_batch": 8,
    "stage_two.global_batch": 8,
    "stage_one.precision": "float32",
    "stage_two.precision": "float32",
}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(step, folder, *rest):
    settings = {**SMALL, "data.path": folder / "pictures"}
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    place = ["--work", str(folder / "work"), "--device", "cpu", "--threads", "1"]
    main([step, *rest, "--recipe", "folder", *place, *changes])


def checkpoints(folder, step):
    return Checkpoints(LocalFolder(folder / "work" / step / "training"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 captioned pictures, and all that the chain makes of them."""
    place = tmp_path_factory.mktemp("main")
    (place / "pictures").mkdir()
    for n in range(30):
        name = list(COLOURS)[n % 3]
        pixels = np.random.default_rng(n).integers(0, 30, (40, 40, 3), dtype=np.uint8)
        pixels += np.array(COLOURS[name], dtype=np.uint8)
        (place / "pictures" / f"{n}.png").write_bytes(encode(pixels, "png"))
        (place / "pictures" / f"{n}.txt").write_text(f"a {name} thing, number {n}")
    threads = torch.get_num_threads()
    run("all", place)
    torch.set_num_threads(threads)
    return place


def test_all_steps_leave_their_folders(folder):
    """Each step leaves a folder of its name, stage three where the recipe has one; both stages a
    model and a whole checkpoint.
    """
    made = {path.name for path in (folder / "work").iterdir() if path.is_dir()}
    assert set(STEPS) - made == {"stage-three"}
    for step in ("stage-one", "stage-two"):
        assert (folder / "work" / step / STUDENT).is_file()
        assert checkpoints(folder, step).newest() is not None


def test_stage_two_starts_from_stage_one(folder, tmp_path, monkeypatch):
    """Without any step of its own, stage two is stage one's student bit for bit."""
    work = tmp_path / "work"
    work.mkdir()
    for step in ("prepare", "teacher", "captions", "stage-one"):
        (work / step).symlink_to(folder / "work" / step)
    (tmp_path / "pictures").symlink_to(folder / "pictures")
    monkeypatch.setitem(SMALL, "stage_two.epochs", 0)
    run("stage-two", tmp_path)
    one, two = (open_student(work / step).state_dict() for step in ("stage-one", "stage-two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    trained = open_student(folder / "work" / "stage-two").state_dict()
    assert not all(torch.equal(one[name], trained[name]) for name in one)


def test_stage_three_goes_on_from_stage_two(folder, tmp_path, monkeypatch):
    """Its model is another one, and the one that draws."""
    work = tmp_path / "work"
    work.mkdir()
    for step in ("prepare", "teacher", "captions", "stage-one", "stage-two"):
        (work / step).symlink_to(folder / "work" / step)
    (tmp_path / "pictures").symlink_to(folder / "pictures")
    monkeypatch.setitem(SMALL, "stage_three.epochs", 2)
    monkeypatch.setitem(SMALL, "stage_three.global_batch", 8)
    run("stage-three", tmp_path)
    two, three = (open_student(work / step).state_dict() for step in ("stage-two", "stage-three"))
    assert not all(torch.equal(two[name], three[name]) for name in two)
    assert checkpoints(tmp_path, "stage-three").newest().critics is not None
    main(["generate", "a red thing", "--work", str(work)])
    drawn = encode_png(open_synthesizer(work / "stage-three")(["a red thing"])[0])
    assert (work / "a-red-thing.png").read_bytes() == drawn


def test_a_finished_stage_run_again_trains_nothing(folder, monkeypatch):
    """Running a finished stage again leaves its checkpoint and its weights as they are."""
    place = folder / "work" / "stage-two"
    before = open_student(place).state_dict()
    monkeypatch.setattr(Checkpoints, "save", lambda *_: pytest.fail("trained again"))
    run("stage-two", folder)
    after = open_student(place).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_made_from_something_else_is_refused(folder, monkeypatch):
    """Another config below the same --work is refused by folder, and changes nothing."""
    before = (folder / "work" / "captions" / ENCODER).read_bytes()
    monkeypatch.setitem(SMALL, "captions.epochs", 2)
    with pytest.raises(SystemExit, match="made from another config or other inputs") as caught:
        run("captions", folder)
    assert "captions" in str(caught.value)
    assert (folder / "work" / "captions" / ENCODER).read_bytes() == before


def test_a_step_before_its_inputs_names_what_to_run(tmp_path):
    """A stage whose inputs are not there says which step makes them."""
    with pytest.raises(SystemExit, match="run `prepare` or `all` first"):
        main(["teacher", "--work", str(tmp_path), "--threads", "1"])


def test_the_newest_two_checkpoints_and_the_best_are_kept(folder, monkeypatch):
    """Others are removed as training goes on."""
    monkeypatch.setitem(SMALL, "stage_one.checkpoint_images", 8)
    shutil.rmtree(folder / "work" / "stage-one")
    run("stage-one", folder)
    kept = sorted((folder / "work" / "stage-one" / "training" / "checkpoints").iterdir())
    assert 2 <= len(kept) <= 3
    assert kept[-1].name.endswith(f"{checkpoints(folder, 'stage-one').newest().step:09d}")


def test_generate_writes_one_picture_a_caption(folder, capsys):
    """Each caption becomes a PNG at the model's resolution, and its path is printed."""
    run("generate", folder, "a red thing", "a blue thing")
    paths = capsys.readouterr().out.split()
    assert len(set(paths)) == 2
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (32, 32)
            assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("step", "rest", "words"),
    [
        ("generate", ["..."], "holds no letter or digit"),
        ("generate", [], "give captions"),
        ("all", ["--set", "stage_one.epoch=3"], "did you mean stage_one.epochs"),
        ("all", ["--set", "data.resolution=50"], "multiple of 32"),
        ("all", ["--set", "stage_one.epochs"], "expected --set key=value"),
    ],
)
def test_errors_are_one_line_with_the_remedy(folder, step, rest, words):
    """What cannot be done ends with one line that says why, not with a traceback."""
    with pytest.raises(SystemExit) as caught:
        main([step, "--recipe", "tiny", "--work", str(folder / "work"), "--threads", "1", *rest])
    assert str(caught.value).startswith("error: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("first", [True, False])
def test_captions_stand_before_or_after_options(folder, capsys, first):
    """The order of captions and options does not matter."""
    options = ["--work", str(folder / "work"), "--threads", "1"]
    rest = ["a green thing", *options] if first else [*options, "a green thing"]
    main(["generate", *rest])
    assert capsys.readouterr().out.strip().endswith("a-green-thing.png")


def test_generate_without_a_model_names_the_folder(tmp_path):
    """Before any stage has run there is no model; the text names where one was looked for."""
    with pytest.raises(SystemExit, match="holds no model") as caught:
        main(["generate", "a bird", "--work", str(tmp_path), "--threads", "1"])
    assert str(tmp_path) in str(caught.value)

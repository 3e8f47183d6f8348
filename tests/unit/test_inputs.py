"""What a run reads that others own is looked at before anything is begun."""

import pytest
import torch
from test_teacher import torchvision_tensors, write
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.inputs import check_inputs
from pipelines.run import RunSpec
from sdn.features.inception import Inception
from sdn.teacher import file_digest


@pytest.fixture
def photos(tmp_path):
    """A folder with something in it; whether that is images is found out later."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.txt").write_text("a bird")
    return folder


@pytest.fixture
def weights(tmp_path):
    """A VGG11 of an eighth of the width in torchvision's layout."""
    return write(tmp_path / "vgg11.pth", torchvision_tensors())


def opened(tmp_path, *changes, recipe="folder"):
    """A run with changes; its store is not made yet."""
    keys = dict(change.split("=", 1) for change in changes)
    return RunSpec(recipe, keys, str(tmp_path / "store")).open()


def teacher(path):
    return (
        f"teacher.weights={path}",
        "teacher.arch=vgg11",
        "teacher.width=0.125",
        "teacher.convention=imagenet",
    )


def test_what_is_there_is_accepted(tmp_path, photos, weights):
    """Images, weights of the teacher and of the scores; the embedded data need no place."""
    inception = tmp_path / "inception.pth"
    torch.save(Inception("").state_dict(), inception)
    scores = ("evaluation.features=inception", f"evaluation.inception={inception}")
    digest = "evaluation.inception_sha256=" + file_digest(inception)
    place = f"data.path={photos}"
    check_inputs(opened(tmp_path, place, *teacher(weights), *scores, digest))
    check_inputs(opened(tmp_path, recipe="tiny"))


def test_a_url_is_not_fetched(tmp_path, photos):
    """A run whose stages are done must not need the network."""
    nowhere = "http://127.0.0.1:9/vgg11.pth"
    check_inputs(
        opened(tmp_path, f"data.path={photos}", *teacher(nowhere), "teacher.sha256=00000000")
    )


@pytest.mark.parametrize("source", ["folder", "parquet", "tars", "coco", "cub", "flowers"])
def test_a_place_without_a_file_is_refused(tmp_path, source):
    """One that is not there, and one that is empty."""
    run = opened(tmp_path, f"data.source={source}", f"data.path={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=r"no folder .*nowhere, or no file in it"):
        check_inputs(run)
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(ValueError, match=r"no folder .*nowhere, or no file in it"):
        check_inputs(run)


def test_a_prepared_place_must_hold_a_data_set(tmp_path, photos):
    """Files that are none do not do."""
    with pytest.raises(ValueError, match="manifest"):
        check_inputs(opened(tmp_path, "data.source=shards", f"data.path={photos}"))


def test_weights_of_another_network_are_refused(tmp_path, photos, weights):
    """They would be read after the images were prepared."""
    place = f"data.path={photos}"
    absent = tmp_path / "absent.pth"
    with pytest.raises(FileNotFoundError, match=r"no weight file at .*absent\.pth"):
        check_inputs(opened(tmp_path, place, *teacher(absent)))
    with pytest.raises(ValueError, match="expected ffffffff: the file is damaged or another"):
        check_inputs(opened(tmp_path, place, *teacher(weights), "teacher.sha256=ffffffff"))
    with pytest.raises(ValueError, match=r"does not hold vgg13 of width 0\.125"):
        check_inputs(opened(tmp_path, place, *teacher(weights), "teacher.arch=vgg13"))
    scores = ("evaluation.features=inception", f"evaluation.inception={weights}")
    with pytest.raises(ValueError, match=r"expected 6726825d"):
        check_inputs(opened(tmp_path, place, *scores))


def test_the_command_refuses_before_it_starts_anything(tmp_path, photos, monkeypatch):
    """No server of Prefect's, and no stage; the reason is one line."""
    monkeypatch.setattr(
        "pipelines.flows.early_server.early_server", lambda: pytest.fail("a server was started")
    )
    words = ["run", "folder", "--store", str(tmp_path / "store")]
    for changes, reason in (
        (["data.path=/nowhere"], "no folder /nowhere"),
        ([f"data.path={photos}", "teacher.weights=/nowhere.pth"], "no weight file at /nowhere.pth"),
    ):
        options = [word for change in changes for word in ("--set", change)]
        done = CliRunner().invoke(app, [*words, *options])
        assert done.exit_code == 1
        assert done.stderr.startswith("error: ")
        assert reason in done.stderr
        assert not [*(tmp_path / "store").glob("stages/*")]

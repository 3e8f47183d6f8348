"""Real images in the feature network, and the judge that is fitted on them."""

from __future__ import annotations

import hashlib
import json

import evaluated
import pytest
import tiny_data
import torch

from sdn.config import EvaluationConfig
from sdn.data.loader import load_split
from sdn.features.networks import open_network
from sdn.judge import open_judge
from sdn.reference import (
    HALVES,
    JUDGE,
    REFERENCE,
    TRAIN,
    open_reference,
    write_judge,
    write_reference,
)
from sdn.scores.kernel import kid


def records(train=20, validation=6, test=11):
    names = ["train"] * train + ["validation"] * validation + ["test"] * test
    return [tiny_data.record(n, split) for n, split in enumerate(names)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return evaluated.make_inputs(tmp_path_factory.mktemp("inputs"), records())


@pytest.fixture(scope="module")
def network(inputs):
    return open_network(EvaluationConfig(features="teacher"), inputs.teacher)


def written(folder, inputs, network, **changes):
    told = []
    about = write_reference(
        folder,
        inputs.data,
        network,
        EvaluationConfig(features="teacher", **changes),
        lambda share, text: told.append((share, text)),
    )
    return about, told


@pytest.fixture(scope="module")
def reference(inputs, network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return folder, *written(folder, inputs, network)


def test_rows_are_the_networks_features_of_the_split(reference, inputs, network):
    """A file a split, in the order of the manifest."""
    opened = open_reference(reference[0])
    for split, count in {"train": 20, "validation": 6, "test": 11}.items():
        rows = opened.rows(split).read(0, 99)
        assert rows.shape == (count, network.dim)
        expected, _ = network(load_split(inputs.data, split).pixels)
        torch.testing.assert_close(rows, expected.clone(), rtol=1e-4, atol=1e-5)


def test_it_says_what_it_is_of(reference, network):
    """Network, size, counts and digest stand beside the rows, and come back from the file."""
    folder, about, _ = reference
    assert about["features"] == {
        "network": "teacher",
        "sha256": network.digest,
        "input_px": "as the image",
        "resize": "none",
        "dim": network.dim,
    }
    assert about["image_px"] == 32
    assert about["images"] == {"train": 20, "validation": 6, "test": 11}
    assert about["digest"] == hashlib.sha256((folder / "test.f32").read_bytes()).hexdigest()
    assert json.loads((folder / REFERENCE).read_text()) == about == open_reference(folder).about


def test_floors_are_real_against_real(reference):
    """The halves of the test split, and test as reference against training images."""
    folder, about, _ = reference
    opened = open_reference(folder)
    test, train = opened.rows("test"), opened.rows("train")
    assert set(about["floors"]) == {HALVES, TRAIN}
    assert about["floors"][HALVES]["kid_error"] == kid(test.part(0, 5), test.part(5, 11)).as_dict()
    assert about["floors"][TRAIN]["kid_error"] == kid(test, train).as_dict()
    assert about["floors"][TRAIN]["diversity_score"]["count"] == 20
    assert "FID needs at least" in about["floors"][TRAIN]["fid_error"]["withheld"]


def test_progress_ends_at_one(reference):
    """Shares rise to 1 over all splits together."""
    shares = [share for share, _ in reference[2]]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert reference[2][-1][1] == "37 of 37 images"


def test_no_more_images_than_configured(inputs, network, reference, tmp_path):
    """`real_images` of a split are its first ones."""
    about, told = written(tmp_path, inputs, network, real_images=7)
    assert about["images"] == {"train": 7, "validation": 6, "test": 7}
    whole = open_reference(reference[0]).rows("train").read(0, 7)
    found = open_reference(tmp_path).rows("train").read(0, 99)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert told[-1][0] == 1


@pytest.mark.parametrize(
    ("counts", "floors"),
    [((6, 0, 5), {HALVES, TRAIN}), ((6, 3, 0), set()), ((3, 0, 1), None)],
)
def test_splits_that_are_missing(counts, floors, network, tmp_path):
    """Without a split there is no file of it, and no floor; one test image has no halves."""
    tiny_data.write(tmp_path / "data", records(*counts))
    (tmp_path / "out").mkdir()
    about = write_reference(
        tmp_path / "out", tmp_path / "data", network, EvaluationConfig(features="teacher")
    )
    assert {p.stem for p in (tmp_path / "out").glob("*.f32")} == set(about["images"])
    if floors is None:
        assert "withheld" in about["floors"][HALVES]["kid_error"]
    else:
        assert set(about["floors"]) == floors
    json.dumps(about, allow_nan=False)


def test_a_folder_without_one_is_named(tmp_path):
    """The error says which file is missing."""
    with pytest.raises(FileNotFoundError, match=r"holds no reference: reference\.json is missing"):
        open_reference(tmp_path)


def test_judge_is_fitted_on_the_reference(reference, inputs, network, tmp_path):
    """It is of the network's width, told with its score, and made again bit for bit."""
    opened = open_reference(reference[0])
    found = write_judge(tmp_path, inputs.data, opened, evaluated.JUDGE_CONFIG)
    assert found["images"] == 20
    assert 0 < found["held_out_score"] <= 1
    judge = open_judge(tmp_path / JUDGE)
    assert judge.config == {"features": network.dim, "dim": 16}
    first = (tmp_path / JUDGE).read_bytes()
    write_judge(tmp_path, inputs.data, opened, evaluated.JUDGE_CONFIG)
    assert (tmp_path / JUDGE).read_bytes() == first


def test_judge_of_fewer_images_reads_as_many_captions(inputs, network, tmp_path):
    """Where the reference holds a part of the training images, the judge is fitted on those."""
    written(tmp_path, inputs, network, real_images=7)
    found = write_judge(tmp_path, inputs.data, open_reference(tmp_path), evaluated.JUDGE_CONFIG)
    assert found["images"] == 7


def test_judge_without_validation_images_has_no_score(network, tmp_path):
    """The score is null, not NaN, which JSON does not know."""
    tiny_data.write(tmp_path / "data", records(6, 0, 2))
    config = EvaluationConfig(features="teacher")
    write_reference(tmp_path, tmp_path / "data", network, config)
    found = write_judge(
        tmp_path, tmp_path / "data", open_reference(tmp_path), evaluated.JUDGE_CONFIG
    )
    assert found == {"held_out_score": None, "images": 6}


def test_judge_without_training_images_is_refused(network, tmp_path):
    """Nothing to tell apart is an error that says so."""
    tiny_data.write(tmp_path / "data", records(1, 0, 4))
    write_reference(tmp_path, tmp_path / "data", network, EvaluationConfig(features="teacher"))
    with pytest.raises(ValueError, match="at least 2 training images, not 1"):
        write_judge(tmp_path, tmp_path / "data", open_reference(tmp_path), evaluated.JUDGE_CONFIG)

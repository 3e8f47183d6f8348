import dataclasses

import pytest
import torch

from sdn.config import LossWeights
from sdn.recipes import RECIPES, recipe
from sdn.stage_run import new_student
from sdn.taps import blocks_of, taps_of
from sdn.teacher import empty_teacher


def check_shapes(config):
    """Taps of teacher and student on two images."""
    side = config.data.resolution
    teacher = empty_teacher(config.teacher)(torch.zeros(2, 3, side, side))
    student = new_student(config)(torch.zeros(2, config.captions.dim))
    assert {n: t.shape for n, t in student.items()} == {n: t.shape for n, t in teacher.items()}
    assert teacher["image"].shape == (2, 3, side, side)
    return teacher


@pytest.mark.parametrize("name", ["tiny", "openmoji", "openmoji-long", "folder"])
def test_teacher_and_student_agree(name):
    """Every tap of the recipe's student has the shape of the teacher's tap of that name."""
    config = recipe(name)
    taps = check_shapes(config)
    assert len(taps) == len(taps_of(empty_teacher(config.teacher).blocks))


def test_a_narrow_student_has_the_taps_of_its_teacher():
    """fashion64: the teacher's blocks, each with a quarter of the channels."""
    config = recipe("fashion64")
    teacher = blocks_of(config.teacher.arch, config.teacher.width)
    assert [(4 * c, n) for c, n in new_student(config).blocks] == [(c, n) for c, n in teacher]


@pytest.mark.parametrize("name", ["cub", "release-cub"])
def test_large_teacher_and_student_agree(name, monkeypatch):
    """At 224 px too, where there are 22 taps and 143.8 M parameters, without computing any."""
    config = recipe(name)
    # A meta tensor has no values to draw; only shapes are looked at.
    monkeypatch.setattr("sdn.student.Student._initialise", lambda self, init, generator: None)
    with torch.device("meta"):
        taps = check_shapes(config)
        student = new_student(config)
    assert len(taps) == 22
    assert taps["pool5"].shape == (2, 512, 7, 7)
    assert round(sum(p.numel() for p in student.parameters()) / 1e6, 1) == 143.8
    assert sum(isinstance(m, torch.nn.Conv2d) for m in student.modules()) == 16


def test_release_cub_keeps_the_releases_values():
    """BGR 0..255 without mean, pixel term on 0..255, batch 12, Adam 1e-4 constant, weights 1."""
    config = recipe("release-cub")
    assert config.teacher.arch == "vgg19"
    assert config.teacher.width == 1
    assert config.teacher.convention == "release"
    assert config.student.init == "release"
    assert config.search.trials == 0
    assert config.captions.encoder == "char-cnn-rnn"
    assert config.captions.dim == 1024
    assert (config.data.source, config.data.resolution, config.data.fit) == ("cub", 224, "resize")
    for stage, pairs in ((config.stage_one, 100), (config.stage_two, 80)):
        assert stage.global_batch == 12
        assert stage.rate == 1e-4
        assert stage.schedule == "constant"
        assert stage.average_share == 0
        assert stage.scale == "raw"
        assert stage.image_scale == 127.5
        assert stage.precision == "float32"
        assert stage.weights == LossWeights()
        assert stage.epochs == 10 * pairs  # one of an image's ten captions an epoch
    blocks = empty_teacher(dataclasses.replace(config.teacher, width=0.02)).blocks
    assert {config.stage_one.weights.of(tap.name) for tap in taps_of(blocks)} == {1}


def test_release_input_is_bgr_over_255():
    """The release's convention hands white over as 255 and swaps red and blue."""
    teacher = empty_teacher(dataclasses.replace(recipe("release-cub").teacher, width=0.02))
    red = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
    assert teacher.normalised(red).flatten().tolist() == [127.5, 0.0, 255.0]


def test_cub_differs_from_the_release_only_where_it_says():
    """`cub` feeds the teacher what its weights expect and searches; sizes and length are equal."""
    cub, release = recipe("cub"), recipe("release-cub")
    assert cub.teacher.convention == "imagenet"
    assert dataclasses.replace(cub.teacher, convention="release") == release.teacher
    assert (cub.data, cub.captions, cub.student) == (
        release.data,
        release.captions,
        release.student,
    )
    assert cub.search.trials > 1


def test_evaluations_are_scored_in_a_network_that_no_recipe_trains():
    """Every recipe is scored in independent features, at a size that they come in."""
    for name in RECIPES:
        config = recipe(name)
        assert config.evaluation.features != "teacher"
        assert config.evaluation.features_size >= config.data.resolution


def test_names_agree_and_have_a_docstring():
    """A recipe is found under the name that its config carries, and says what it is."""
    for name, make in RECIPES.items():
        assert recipe(name).name == name
        assert make.__doc__


def test_unknown_recipe_names_those_there_are():
    """A typing error in the name is answered with the names."""
    with pytest.raises(ValueError, match="no recipe 'opnmoji'") as caught:
        recipe("opnmoji")
    for name in RECIPES:
        assert name in str(caught.value)


def test_each_call_makes_its_own_config():
    """Recipes are functions: no two runs share a changeable part."""
    one, other = recipe("tiny"), recipe("tiny")
    one.stage_one.weights.taps["conv1_1"] = 5.0
    assert other.stage_one.weights.taps == {}

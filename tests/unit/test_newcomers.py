"""A champion and its challenger on the test images that came with new data."""

from __future__ import annotations

import dataclasses

import pytest
from evaluated import config_of, make_inputs, make_places
from tiny_data import append, record, records

from pipelines.comparing import Champion, no_champion
from pipelines.evaluating import Model
from pipelines.newcomers import compare_on_new
from pipelines.run import Done, RunSpec
from sdn.data.dataset import open_dataset
from sdn.stage_run import new_student, write_model


class Store:
    """Stages that lie in folders of any name."""

    def __init__(self, folders):
        self.folders = folders

    def fetch(self, name):
        return self.folders[name]


def done(name, **result):
    return Done(name=name, key=f"key of {name}", folder=name, result=result, seconds=1, fresh=False)


@pytest.fixture
def new(tmp_path):
    """A run, its inputs, and two models; 14 test images came since the first version."""
    config = config_of()
    inputs = make_inputs(tmp_path, records(17, 8))
    places = make_places(tmp_path, inputs, config)
    before = open_dataset(inputs.data).manifest.digest
    append(inputs.data, [record(n, "test") for n in range(100, 114)])
    models = []
    for seed in (1, 2):
        folder = tmp_path / f"model{seed}"
        folder.mkdir()
        stage = dataclasses.replace(config.stage_one, seed=seed)
        student = new_student(dataclasses.replace(config, stage_one=stage))
        write_model(folder, config, inputs.captions, student.state_dict())
        models.append(folder)
    run = dataclasses.replace(RunSpec("tiny", store=str(tmp_path / "store")).open(), config=config)
    object.__setattr__(run, "store", Store({"teacher": inputs.teacher, "judge": places["judge"]}))
    place = str(inputs.data)
    now = open_dataset(inputs.data).manifest.digest
    stages = {
        "data": done("prepare", manifest=now, place=place),
        "teacher": done("teacher", sha256="t"),
        "judge": done("judge"),
    }
    return run, stages, done("prepare", manifest=before, place=place), models


def compared(new, folder, champion, challenger):
    run, stages, since, models = new
    job = compare_on_new(
        run,
        stages,
        since,
        Model(digest=f"digest {challenger}", folder=models[challenger]),
        Champion(title="1", digest=f"digest {champion}", folder=lambda: models[champion]),
    )
    folder.mkdir()
    return job.stage.key, job.work(folder)


def test_both_are_scored_on_the_images_that_came(new, tmp_path):
    """14 images, the gain is the difference of both models' KID, and no features are kept."""
    key, found = compared(new, tmp_path / "out", 0, 1)
    assert found["images"] == found["gain"]["count"] == 14
    kid = {name: scores["kid_error"]["value"] for name, scores in found["scores"].items()}
    difference = kid["champion"] - kid["challenger"]
    assert found["gain"]["value"] == pytest.approx(difference, rel=0.05, abs=1e-3)
    assert found["better_p_value"] + found["worse_p_value"] >= 1
    assert list((tmp_path / "out").iterdir()) == []
    other, turned = compared(new, tmp_path / "turned", 1, 0)
    assert other != key
    assert turned["gain"]["value"] == pytest.approx(-found["gain"]["value"])
    assert turned["worse_p_value"] == pytest.approx(found["better_p_value"])


def test_a_model_is_not_worse_than_itself(new, tmp_path):
    """The same files give no difference and no alarm."""
    _, found = compared(new, tmp_path / "out", 0, 0)
    assert found["gain"]["value"] == 0
    assert found["worse_p_value"] == 1


def test_without_a_champion_there_is_nothing_to_compare(new):
    """Untrained weights are judged on the fixed split alone."""
    run, stages, since, models = new
    model = Model(digest="d", folder=models[0])
    assert compare_on_new(run, stages, since, model, no_champion()) is None

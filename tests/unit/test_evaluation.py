"""Scores of models and of what needs no model, on a tiny data set."""

from __future__ import annotations

import json

import pytest
import tiny_data
import torch

from sdn.baselines import TONES
from sdn.caption_fitting import fit_captions
from sdn.captions import new_encoder, save_encoder
from sdn.config import (
    CaptionConfig,
    EvaluationConfig,
    RunConfig,
    SearchConfig,
    StudentConfig,
    TeacherConfig,
)
from sdn.data.dataset import open_dataset
from sdn.data.loader import load_split
from sdn.evaluation import evaluate, probe_embedding, synthesizer_of, validation_score
from sdn.metrics import blurred, identity_groups
from sdn.sampling import ENCODER
from sdn.stage_run import TAP_MEANS, TEACHER, StageInputs, new_student, write_model
from sdn.teacher import empty_teacher, save_teacher

BLURS = ("true image blurred by 5 px", "true image blurred by 9 px")
TONED = ("nearest-tone training image", "mean of the two nearest-tone training images")
SCORES = ("top1_score", "top5_score", "median_rank", "reciprocal_rank_score")


def config_of(**changes):
    values = {"evaluation": EvaluationConfig(subsets=3, subset_size=4)}
    return RunConfig(
        name="tiny",
        data=tiny_data.CONFIG,
        teacher=TeacherConfig(arch="vgg11", width=0.05, convention="symmetric"),
        captions=CaptionConfig(dim=8, width=8, max_chars=40),
        student=StudentConfig(init="he"),
        **(values | changes),
    )


def make_inputs(folder, records):
    """Data, teacher and captions of a run in folders of their own."""
    config = config_of()
    found = StageInputs(
        data=folder / "data", teacher=folder / "teacher", captions=folder / "captions"
    )
    for path in (found.data, found.teacher, found.captions):
        path.mkdir(parents=True)
    tiny_data.write(found.data, records)
    torch.manual_seed(0)
    teacher = empty_teacher(config.teacher)
    for conv in teacher.convs.values():
        torch.nn.init.normal_(conv.weight, 0, (2 / conv.weight[0].numel()) ** 0.5)
    save_teacher(teacher, found.teacher / TEACHER)
    (found.teacher / TAP_MEANS).write_text(json.dumps(dict.fromkeys(teacher.names, 1.0)))
    save_encoder(new_encoder(config.captions), found.captions / ENCODER)
    return found


def plain(train=9, validation=4, test=5):
    names = ["train"] * train + ["validation"] * validation + ["test"] * test
    return [tiny_data.record(n, split) for n, split in enumerate(names)]


def toned():
    """Five tones of three concepts; the middle one of each is tested on."""
    found = []
    for concept in range(3):
        for step, tone in enumerate(TONES):
            split = {1: "validation", 2: "test"}.get(step, "train")
            labels = {"concept": f"concept {concept}", "tone": tone, "gender": "man"}
            captions = (f"concept {concept}: {tone}",)
            number = 5 * concept + step
            found.append(tiny_data.record(number, split, captions=captions, labels=labels))
    return found


def evaluated(folder, records, config=None):
    """The evaluation of one model, the inputs, and the rows in the order of their reports."""
    config = config or config_of()
    inputs = make_inputs(folder, records)
    weights = {k: v * 1.1 for k, v in new_student(config).state_dict().items()}
    (folder / "model").mkdir()
    write_model(folder / "model", config, inputs.captions, weights)
    rows = []
    return evaluate(config, inputs, {"stage two": folder / "model"}, rows.append), inputs, rows


@pytest.fixture(scope="module")
def plain_evaluation(tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp("plain"), plain())


@pytest.fixture(scope="module")
def toned_evaluation(tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp("toned"), toned())


def test_rows(plain_evaluation):
    """There is a row for the real images, each model, the untrained student and each blur."""
    found, _, reported = plain_evaluation
    assert set(found.scores) == {"real", "stage two", "untrained weights", *BLURS}
    assert reported == list(found.scores)
    for row, scores in found.scores.items():
        expected = {f"{space}/{score}" for space in ("pixels", "teacher") for score in SCORES}
        assert expected <= set(scores), row
        assert scores["pixels/queries"] == scores["teacher/queries"] == 5
        assert ("kernel_distance" in scores) == (row not in BLURS)
        assert all(value == value for value in scores.values()), row  # noqa: PLR0124 (no NaN)


def test_real_images_score_full_marks(plain_evaluation):
    """The true images are first in both spaces, and as near to themselves as kernels can tell."""
    real = plain_evaluation[0].scores["real"]
    for space in ("pixels", "teacher"):
        assert real[f"{space}/top1_score"] == 1
        assert real[f"{space}/median_rank"] == 1
    assert real["kernel_distance"] <= plain_evaluation[0].scores["stage two"]["kernel_distance"]


def test_models_are_scored_on_what_they_draw(plain_evaluation):
    """Images and captions of the result are those of the test split, one a caption."""
    found, inputs, _ = plain_evaluation
    test = load_split(inputs.data, "test")
    assert set(found.images) == {"real", "stage two", "untrained weights"}
    assert torch.equal(found.images["real"], test.pixels)
    assert found.captions == tuple(captions[0] for captions in test.captions)
    untrained = synthesizer_of(config_of(), new_encoder(config_of().captions), None)
    assert torch.equal(found.images["untrained weights"], untrained(found.captions))
    assert not torch.equal(found.images["stage two"], found.images["untrained weights"])
    assert len(identity_groups(found.images["stage two"]).unique()) == 5


def test_toned_data_has_the_sibling_baselines(toned_evaluation, plain_evaluation):
    """Where labels name tones, the nearest training images are scored too; else they are not."""
    assert {*BLURS, *TONED} <= set(toned_evaluation[0].scores)
    assert not {*TONED} & set(plain_evaluation[0].scores)


def test_copying_a_training_image_never_finds_the_true_one(toned_evaluation):
    """A copied training image is nearest to itself, so its top 1 is 0 and its rank above 1."""
    scores = toned_evaluation[0].scores["nearest-tone training image"]
    for space in ("pixels", "teacher"):
        assert scores[f"{space}/top1_score"] == 0
        assert scores[f"{space}/median_rank"] > 1


def test_blur_row_is_the_blurred_image(tmp_path):
    """A blurred true image is found as well as its blurred pixels are near it: here, at once."""
    records = []
    for n, split in enumerate(["train"] * 3 + ["test"] * 3):
        flat = torch.full((32, 32, 3), 40 * n + 10, dtype=torch.uint8).numpy()
        image = tiny_data.encode(flat, "png")
        records.append(tiny_data.record(n, split, image=image))
    found, _, _ = evaluated(tmp_path, records)
    for row in BLURS:
        assert found.scores[row]["pixels/top1_score"] == 1
    assert torch.equal(blurred(found.images["real"], 5), found.images["real"])


def test_limit_on_captions(tmp_path):
    """No more captions are scored than configured."""
    config = config_of(evaluation=EvaluationConfig(captions=3, subsets=2, subset_size=3))
    found, _, _ = evaluated(tmp_path, plain(), config)
    assert len(found.captions) == 3
    assert found.scores["real"]["pixels/queries"] == 3
    assert found.scores["real"]["pixels/top1_score"] == 1


def test_identical_test_image_in_training_counts_as_one(tmp_path):
    """A test image that is also a training image is still found first by itself."""
    records = plain()
    records[-1] = tiny_data.record(17, "test", image=records[0].image)
    found, _, _ = evaluated(tmp_path, records)
    assert found.scores["real"]["pixels/top1_score"] == 1
    assert found.scores["real"]["teacher/top1_score"] == 1


def test_no_test_split_is_refused(tmp_path):
    """Data without a test split names the setting to raise."""
    with pytest.raises(ValueError, match=r"no test split .* raise data\.test_share"):
        evaluated(tmp_path, plain(test=0))


def test_no_validation_split_is_no_hindrance(tmp_path):
    """Evaluation needs train and test alone."""
    found, _, _ = evaluated(tmp_path, plain(validation=0))
    assert found.scores["real"]["pixels/top1_score"] == 1


def test_validation_score_does_not_read_the_test_split(tmp_path):
    """The score that ranks trials is the same with the test split's files gone."""
    config = config_of()
    inputs = make_inputs(tmp_path, plain())
    weights = new_student(config).state_dict()
    before = validation_score(config, inputs, weights)
    for shard in open_dataset(inputs.data).shards("test"):
        found = [path for path in inputs.data.rglob("*") if path.stem == shard_stem(shard)]
        assert found
        for path in found:
            path.unlink()
    with pytest.raises(Exception, match="test"):
        load_split(inputs.data, "test")
    assert validation_score(config, inputs, weights) == before
    assert 0 < before <= 1


def shard_stem(shard):
    return shard.name.rsplit("/", 1)[-1].split(".", 1)[0]


def test_validation_score_ranks(tmp_path, monkeypatch):
    """A model that draws the true images scores 1, and fewer captions can be asked for."""
    inputs = make_inputs(tmp_path, plain())
    held = load_split(inputs.data, "validation")
    asked = []

    class Knowing:
        def of_data(self, captions):
            asked.append(list(captions))
            return held.pixels[: len(captions)]

    monkeypatch.setattr("sdn.evaluation.synthesizer_of", lambda *arguments: Knowing())
    assert validation_score(config_of(), inputs, {}) == 1
    few = config_of(search=SearchConfig(captions=2))
    assert validation_score(few, inputs, {}) == 1
    assert [len(captions) for captions in asked] == [4, 2]


def test_probe_embedding(toned_evaluation, plain_evaluation):
    """Tones are probed where labels have more than one; data without such labels has no probe."""
    _, inputs, _ = toned_evaluation
    assert probe_embedding(inputs.data, inputs.captions) == {}  # the held-out tone is not known
    _, inputs, _ = plain_evaluation
    assert probe_embedding(inputs.data, inputs.captions) == {}


def test_probe_embedding_reads_tones(tmp_path):
    """With tones in both splits fitted captions' tones are read off the embedding of new ones."""
    records = []
    for n in range(40):
        tone = TONES[n % 2 * 4]
        split = "validation" if n >= 30 else "train"
        captions = (f"{tone}, picture {n}",)
        records.append(tiny_data.record(n, split, captions=captions, labels={"tone": tone}))
    inputs = make_inputs(tmp_path, records)
    encoder = fit_captions(
        load_split(inputs.data, "train").captions,
        torch.tensor([[n % 2.0, 1 - n % 2.0] for n in range(30)]),
        CaptionConfig(dim=8, width=8, max_chars=40, epochs=20, batch=6, rate=5e-3),
    )
    save_encoder(encoder, inputs.captions / ENCODER)
    found = probe_embedding(inputs.data, inputs.captions)
    assert set(found) == {"tone"}
    assert 0.8 <= found["tone"] <= 1

"""Which pictures and which references stand behind each score, checked with scores that record."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import tiny_data
import torch

from sdn.baselines import TONES
from sdn.captions import new_encoder, open_encoder, save_encoder
from sdn.config import (
    CaptionConfig,
    EvaluationConfig,
    LossWeights,
    RunConfig,
    SearchConfig,
    StudentConfig,
    TeacherConfig,
)
from sdn.data.loader import load_split
from sdn.evaluation import Gallery, evaluate, synthesizer_of, validation_score
from sdn.metrics import kernel_distance, tap_features
from sdn.sampling import ENCODER
from sdn.stage_run import TEACHER, StageInputs, new_student, write_model
from sdn.teacher import empty_teacher, open_teacher, save_teacher

CONFIG = RunConfig(
    name="rows",
    data=tiny_data.CONFIG,
    teacher=TeacherConfig(arch="vgg11", width=0.05, convention="symmetric"),
    captions=CaptionConfig(dim=8, width=8, max_chars=40),
    student=StudentConfig(init="he"),
    search=SearchConfig(captions=4),
    evaluation=EvaluationConfig(subsets=3, subset_size=3),
)
LIGHT, MEDIUM_LIGHT, MEDIUM, MEDIUM_DARK, DARK = TONES
SPLITS = {LIGHT: "train", MEDIUM_LIGHT: "test", MEDIUM_DARK: "validation", DARK: "train"}
SPLITS[MEDIUM] = "train"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Four concepts in five tones: medium-light is tested on, light and medium are trained on."""
    folder = tmp_path_factory.mktemp("rows")
    records = [
        tiny_data.record(
            10 * c + t,
            SPLITS[tone],
            captions=(f"concept {c}: {tone}",),
            labels={"concept": f"concept {c}", "tone": tone},
        )
        for c in range(4)
        for t, tone in enumerate(TONES)
    ]
    tiny_data.write(folder / "data", records)
    torch.manual_seed(0)
    teacher = empty_teacher(CONFIG.teacher)
    for conv in teacher.convs.values():
        torch.nn.init.normal_(conv.weight, 0, (2 / conv.weight[0].numel()) ** 0.5)
    save_teacher(teacher, folder / TEACHER)
    save_encoder(new_encoder(CONFIG.captions), folder / ENCODER)
    return StageInputs(data=folder / "data", teacher=folder, captions=folder)


def changed_weights():
    return {name: value * 1.2 for name, value in new_student(CONFIG).state_dict().items()}


@pytest.fixture(scope="module")
def found(inputs, tmp_path_factory):
    """An evaluation, and the pictures that each of its rows was scored on."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, CONFIG, inputs.captions, changed_weights())
    scored, score, rows = [], Gallery.scores, []

    def recording(self, pixels, truth):
        scored.append(pixels)
        return score(self, pixels, truth)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gallery, "scores", recording)
        result = evaluate(CONFIG, inputs, {"stage two": folder}, rows.append)
    return result, dict(zip(rows, scored, strict=True))


def test_tone_rows_draw_the_neighbouring_tones(found, inputs):
    """Both neighbours are one step away: the earlier row is the nearest, the mean is of the two."""
    _, pictures = found
    train = load_split(inputs.data, "train")
    place = {(s["concept"], s["tone"]): row for row, s in enumerate(train.labels)}
    concepts = [labels["concept"] for labels in load_split(inputs.data, "test").labels]
    light = train.pixels[[place[c, LIGHT] for c in concepts]]
    medium = train.pixels[[place[c, MEDIUM] for c in concepts]]
    earlier = train.pixels[[min(place[c, LIGHT], place[c, MEDIUM]) for c in concepts]]
    assert torch.equal(pictures["nearest-tone training image"], earlier)
    mean = pictures["mean of the two nearest-tone training images"]
    away = mean.double() - (light.double() + medium.double()) / 2
    assert away.abs().max() <= 0.5
    # Halves go both ways, so that the mean picture is not a darker one.
    assert abs(away.mean()) < 0.05


def test_every_row_scores_its_own_pictures(found):
    """Rows of models are scored on the images that are shown for them."""
    result, pictures = found
    for row, images in result.images.items():
        assert torch.equal(pictures[row], images), row
    assert pictures.keys() == result.scores.keys()


def test_kernel_distance_compares_with_the_true_test_images(found, inputs):
    """KID's reference is the test split's images alone, in the teacher's features."""
    result, _ = found
    teacher = open_teacher(inputs.teacher / TEACHER)
    real = tap_features(teacher, load_split(inputs.data, "test").pixels)
    for row, images in result.images.items():
        expected = kernel_distance(real, tap_features(teacher, images), subsets=3, subset_size=3)
        scores = result.scores[row]
        came = (scores["kernel_distance"], scores["kernel_distance_std"])
        assert came == pytest.approx(expected, rel=1e-4, abs=1e-6), row
    json.dumps(result.scores)  # plain values


def test_weights_in_memory_are_those_drawn_with(found, inputs):
    """Weights draw what a model folder of them draws; None draws the untrained student."""
    result, _ = found
    encoder = open_encoder(inputs.captions / ENCODER)
    trained = synthesizer_of(CONFIG, encoder, changed_weights())(result.captions)
    untrained = synthesizer_of(CONFIG, encoder, None)(result.captions)
    assert (trained.int() - result.images["stage two"].int()).abs().max() <= 1
    assert torch.equal(untrained, result.images["untrained weights"])
    assert (trained.int() - untrained.int()).abs().max() > 1


def test_validation_score_follows_the_trials_weights(inputs):
    """Students of different weights are ranked by what they draw: not all score the same."""
    config = dataclasses.replace(CONFIG, search=SearchConfig(captions=2))
    scores = set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.randn(value.shape, generator=generator) * 0.3
            for name, value in new_student(CONFIG).state_dict().items()
        }
        scores.add(validation_score(config, inputs, weights))
    assert len(scores) > 1
    assert all(0 < score <= 1 for score in scores)


def test_validation_score_takes_so_many_captions(inputs, monkeypatch):
    """`search.captions` captions are drawn, and all of them where there are fewer."""
    drawn = []
    real = synthesizer_of

    def counting(config, encoder, weights):
        model = real(config, encoder, weights)
        draw = model.of_data
        return SimpleNamespace(of_data=lambda found: drawn.append(len(found)) or draw(found))

    monkeypatch.setattr("sdn.evaluation.synthesizer_of", counting)
    for wanted in (2, 3, 99):
        config = dataclasses.replace(CONFIG, search=SearchConfig(captions=wanted))
        validation_score(config, inputs, changed_weights())
    assert drawn == [2, 3, 4]


def test_validation_score_does_not_change_with_the_loss_weights(inputs):
    """The same student scores the same, whatever weights its stage was configured with."""
    other = dataclasses.replace(CONFIG.stage_two, weights=LossWeights(image=99, conv5=0.1))
    changed = dataclasses.replace(CONFIG, stage_two=other)
    weights = changed_weights()
    assert validation_score(changed, inputs, weights) == validation_score(CONFIG, inputs, weights)

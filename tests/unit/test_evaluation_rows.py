"""Which pictures stand behind each row that needs no model, checked with scores that record."""

import pytest
import tiny_data
import torch
from evaluated import config_of, make_evaluator, make_inputs

import sdn.evaluation
from sdn.baselines import TONES
from sdn.data.loader import load_split
from sdn.evaluation import baseline_scores
from sdn.metrics import blurred

LIGHT, MEDIUM_LIGHT, MEDIUM, MEDIUM_DARK, DARK = TONES
SPLITS = {LIGHT: "train", MEDIUM_LIGHT: "test", MEDIUM_DARK: "validation", DARK: "train"}
SPLITS[MEDIUM] = "train"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Four concepts in five tones: medium-light is tested on, light and medium are trained on."""
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
    return make_inputs(tmp_path_factory.mktemp("rows"), records)


@pytest.fixture(scope="module", params=[64, 3])
def found(request, inputs, tmp_path_factory):
    """The rows that need no model, and the pictures that each was scored on, in any blocks."""
    scored, score = [], sdn.evaluation._retrieval_of

    def recording(evaluator, blocks):
        pictures = list(blocks)
        assert max(map(len, pictures)) <= request.param
        scored.append(torch.cat(pictures))
        return score(evaluator, iter(pictures))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdn.evaluation, "_BATCH", request.param)
        evaluator = make_evaluator(tmp_path_factory.mktemp("found"), inputs, config_of())
        patch.setattr(sdn.evaluation, "_retrieval_of", recording)
        scores = baseline_scores(evaluator, evaluator.draws)
    return dict(zip(scores, scored, strict=True))


def test_tone_rows_draw_the_neighbouring_tones(found, inputs):
    """Both neighbours are one step away: the earlier row is the nearest, the mean is of the two."""
    train = load_split(inputs.data, "train")
    place = {(s["concept"], s["tone"]): row for row, s in enumerate(train.labels)}
    concepts = [labels["concept"] for labels in load_split(inputs.data, "test").labels]
    light = train.pixels[[place[c, LIGHT] for c in concepts]]
    medium = train.pixels[[place[c, MEDIUM] for c in concepts]]
    earlier = train.pixels[[min(place[c, LIGHT], place[c, MEDIUM]) for c in concepts]]
    assert torch.equal(found["nearest-tone training image"], earlier)
    mean = found["mean of the two nearest-tone training images"]
    away = mean.double() - (light.double() + medium.double()) / 2
    assert away.abs().max() <= 0.5
    # Halves go both ways, so that the mean picture is not a darker one.
    assert abs(away.mean()) < 0.05


@pytest.mark.parametrize("side", [5, 9])
def test_blur_rows_are_the_blurred_true_images(found, inputs, side):
    """Each true image, blurred, in the order of the captions."""
    expected = blurred(load_split(inputs.data, "test").pixels, side)
    assert torch.equal(found[f"true image blurred by {side} px"], expected)

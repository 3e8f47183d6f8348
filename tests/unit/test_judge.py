"""The judge: learns, keeps, comes back, and shares nothing with what it judges."""

from __future__ import annotations

import json
import math

import pytest
import torch

import sdn.judge
from sdn.captions import new_encoder
from sdn.config import CaptionConfig, JudgeConfig
from sdn.judge import (
    BUCKETS,
    Judge,
    fit_judge,
    held_out_score,
    open_judge,
    save_judge,
    tokens,
)

CONFIG = JudgeConfig(dim=24, epochs=15, batch=32, rate=5e-3)
COLOURS = ("red", "green", "blue", "white", "black", "brown")
THINGS = ("bird", "flower", "house", "wheel", "bottle", "face", "tree", "boat")


def toy(n, seed=0, constant=0):
    """Captions of two words, and features that hold both, some noise and constants."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(48, (n,), generator=generator).tolist()
    captions = [
        (f"a {COLOURS[r % 6]} {THINGS[r // 6]}", f"{THINGS[r // 6]}, {COLOURS[r % 6]}")
        for r in rows
    ]
    features = torch.zeros(n, 20)
    for i, r in enumerate(rows):
        features[i, r % 6] = features[i, 6 + r // 6] = 1
    features += 0.05 * torch.randn(n, 20, generator=generator)
    return captions, torch.cat([features, torch.full((n, constant), 0.5)], dim=1)


@pytest.fixture(scope="module")
def fitted():
    """A judge of 300 images, held against 40 others, and what was reported of it."""
    told = []
    judge, score = fit_judge(
        *toy(300), *toy(40, seed=1), CONFIG, lambda share, text: told.append((share, text))
    )
    return judge, score, told


def match(judge, captions, features):
    """How often an image prefers its own caption to another image's of other words."""
    with torch.no_grad():
        scores = judge.of_features(features) @ judge.of_captions([c[0] for c in captions]).T
    other = torch.tensor([[a[0] != b[0] for b in captions] for a in captions])
    return float((scores.diagonal().unsqueeze(1) > scores)[other].double().mean())


def test_it_learns_what_captions_say(fitted):
    """New images are matched with their captions; before fitting by chance only."""
    judge, score, _ = fitted
    captions, features = toy(60, seed=2)
    assert match(judge, captions, features) > 0.97
    torch.manual_seed(0)
    assert 0.2 < match(Judge(features=20, dim=24), captions, features) < 0.8
    assert score == held_out_score(judge, *toy(40, seed=1))
    assert score > 0.5


def test_the_epoch_that_held_out_images_like_best_is_kept(monkeypatch):
    """The weights that come back are those of the best epoch, not of the last."""
    seen, scores = [], [0.2, 0.9, 0.5, 0.9]

    def scripted(judge, captions, features):
        seen.append({name: value.clone() for name, value in judge.state_dict().items()})
        return scores[len(seen) - 1]

    monkeypatch.setattr(sdn.judge, "held_out_score", scripted)
    config = JudgeConfig(dim=8, epochs=4, batch=16)
    judge, best = fit_judge(*toy(40), *toy(10, seed=1), config)
    assert best == 0.9
    for name, value in judge.state_dict().items():
        assert torch.equal(value, seen[1][name]), name
    assert not torch.equal(seen[1]["image.weight"], seen[3]["image.weight"])


def test_the_last_epoch_is_kept_without_held_out_images():
    """Without validation images the score is NaN and the judge is as long fitted as configured."""
    captions, features = toy(300)
    judge, score = fit_judge(captions, features, [], features[:0], CONFIG)
    assert math.isnan(score)
    assert match(judge, *toy(60, seed=2)) > 0.97


def test_same_seed_same_weights():
    """The seed alone decides; the global generator is neither read nor moved."""
    config = JudgeConfig(dim=8, epochs=2, batch=16)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, _ = fit_judge(*toy(40), *toy(10, seed=1), config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two, _ = fit_judge(*toy(40), *toy(10, seed=1), config)
    other, _ = fit_judge(*toy(40), *toy(10, seed=1), JudgeConfig(dim=8, epochs=2, batch=16, seed=1))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert not torch.equal(one.image.weight, other.image.weight)


def test_it_comes_back_from_its_file(fitted, tmp_path):
    """An opened judge is frozen and says the same, bit for bit."""
    judge, _, _ = fitted
    save_judge(judge, tmp_path / "judge.safetensors")
    opened = open_judge(tmp_path / "judge.safetensors")
    captions, features = toy(20, seed=3)
    texts = [c[0] for c in captions]
    assert torch.equal(opened.of_captions(texts), judge.of_captions(texts))
    assert torch.equal(opened.of_features(features), judge.of_features(features))
    assert not any(p.requires_grad for p in opened.parameters())
    assert not opened.training
    save_judge(opened, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "judge.safetensors").read_bytes()


def test_a_damaged_file_is_named(tmp_path):
    """No file and half a file are errors with its name."""
    with pytest.raises(FileNotFoundError, match=r"judge\.safetensors"):
        open_judge(tmp_path / "judge.safetensors")
    save_judge(Judge(features=3, dim=4), tmp_path / "judge.safetensors")
    content = (tmp_path / "judge.safetensors").read_bytes()
    (tmp_path / "judge.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"judge\.safetensors is not a whole model file"):
        open_judge(tmp_path / "judge.safetensors")


def test_its_parameters_are_its_own(fitted, monkeypatch):
    """The judge holds words, text and image alone, and opens no encoder of captions."""
    judge, _, _ = fitted
    names = {name.split(".")[0] for name, _ in judge.named_parameters()}
    assert names == {"words", "text", "image"}
    encoder = new_encoder(CaptionConfig(dim=8, width=8, max_chars=40))
    theirs = {parameter.data_ptr() for parameter in encoder.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in judge.parameters()}

    def refuse(*arguments):
        raise AssertionError("the judge must not read the captions that the student reads")

    monkeypatch.setattr("sdn.captions.open_encoder", refuse)
    monkeypatch.setattr("sdn.captions.new_encoder", refuse)
    fit_judge(*toy(20), *toy(5, seed=1), JudgeConfig(dim=8, epochs=1, batch=8))
    assert not {"new_encoder", "open_encoder", "CharCnnRnn", "SentenceEncoder"} & set(
        vars(sdn.judge)
    )


def test_what_never_varied_decides_nothing():
    """Features that are constant in all real images do not count where drawn ones differ there."""
    captions, features = toy(300, constant=3)
    judge, _ = fit_judge(captions, features, *toy(40, seed=1, constant=3), CONFIG)
    captions, features = toy(60, seed=2, constant=3)
    assert match(judge, captions, features) > 0.97
    drawn = features.clone()
    drawn[:, -3:] += torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(judge.of_features(drawn), judge.of_features(features))


def test_vectors_have_unit_length(fitted):
    """Captions of any kind, an empty one too, and any features become unit vectors."""
    judge, _, _ = fitted
    captions = ["a red bird", "", "!!!", "<b>&amp;</b>", "дом", "x" * 3000, "a"]
    found = judge.of_captions(captions)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(7))
    rows = judge.of_features(100 * torch.randn(5, 20))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    # A caption's vector is its own, whatever is beside it.
    torch.testing.assert_close(judge.of_captions(captions[:1])[0], found[0])


def test_tokens():
    """Words, neighbouring pairs and pieces of four letters, however a caption is written."""
    assert len(tokens("red bird")) == 2 + 1 + 2 + 3
    assert tokens("Red   BIRD") == tokens("red bird")
    assert set(tokens("red")) <= set(tokens("a red bird"))
    assert tokens("bird red") != tokens("red bird")
    assert tokens("") == [0]
    assert all(0 <= token < BUCKETS for token in tokens("a" * 500 + " дом"))


def test_reports_and_refusals(fitted):
    """Each epoch is reported with its loss; one image is too few to tell apart."""
    told = fitted[2]
    assert [share for share, _ in told] == [(n + 1) / 15 for n in range(15)]
    assert all("loss" in text and "held out" in text for _, text in told)
    with pytest.raises(ValueError, match="at least 2 training images, not 1"):
        fit_judge([("x",)], torch.zeros(1, 3), [], torch.zeros(0, 3), CONFIG)
    json.dumps(fitted[0].config)


def test_nothing_held_out_is_not_spoken_of():
    """Data without a validation split: progress is the loss alone, not a score that is NaN."""
    captions, features = toy(8)
    told = []
    judge, score = fit_judge(
        captions, features, [], torch.zeros(0, features.shape[1]), CONFIG, lambda *t: told.append(t)
    )
    assert math.isnan(score)
    assert len(told) == CONFIG.epochs
    assert all(text.startswith("loss ") and "," not in text for _, text in told)
    assert all(value.isfinite().all() for value in judge.state_dict().values())


def test_two_images_are_enough():
    """The least there can be is fitted, to finite numbers."""
    captions, features = toy(2)
    judge, score = fit_judge(captions, features, captions, features, CONFIG)
    assert 0 < score <= 1
    assert all(value.isfinite().all() for value in judge.state_dict().values())

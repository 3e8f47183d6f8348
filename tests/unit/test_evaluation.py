"""Scores of models and of what needs no model, on a tiny data set, from end to end."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import tiny_data
import torch
from evaluated import config_of, make_evaluator, make_inputs, make_places

from sdn.baselines import TONES
from sdn.caption_fitting import fit_captions
from sdn.captions import new_encoder, open_encoder, save_encoder
from sdn.config import CaptionConfig, StudentConfig
from sdn.data.dataset import open_dataset
from sdn.data.loader import load_split
from sdn.draws import plan_draws
from sdn.evaluation import (
    UNTRAINED,
    baseline_scores,
    blocks_again,
    class_table,
    drawn_blocks,
    feature_file,
    open_evaluator,
    pictures,
    probe_embedding,
    synthesizer_of,
)
from sdn.features.networks import open_network
from sdn.features.rows import Rows
from sdn.reference import REFERENCE
from sdn.sampling import ENCODER
from sdn.scores.kernel import kid
from sdn.stage_run import new_student

BLURS = {"true image blurred by 5 px", "true image blurred by 9 px"}
NEAREST, MEAN = "nearest-tone training image", "mean of the two nearest-tone training images"
SET_SCORES = {"kid_error", "fid_error", "precision_score", "recall_score", "diversity_score"}
RETRIEVAL = {"top1_score", "top5_score", "median_rank", "reciprocal_rank_score"}
MARKUP = (
    "<script>alert(1)</script> & \"quotes\" 'single' {{ braces }}",
    "**bold** [link](x) \\n back",
    "дом 房子 🏠",
    "<b>%s %d</b>",
    "a",
)


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


def large():
    """Enough captions for caption match: 120 training and 30 test images, some of them equal."""
    records = [tiny_data.record(n) for n in range(120)]
    for n in range(30):
        captions = (MARKUP[n] if n < len(MARKUP) else f"test picture {n}", f"again {n}")
        # The first two of training are test images too, and two test images are one.
        image = records[n].image if n < 2 else tiny_data.record(200 + min(n, 28)).image
        records.append(tiny_data.record(200 + n, "test", captions=captions, image=image))
    return records


def untrained(config):
    return synthesizer_of(config, new_encoder(config.captions), None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An evaluator of the large set, the untrained student's and the real images' results."""
    folder, config = tmp_path_factory.mktemp("whole"), config_of()
    inputs = make_inputs(folder, large())
    evaluator = make_evaluator(folder, inputs, config)
    counted = []
    model = evaluator.score(
        UNTRAINED, drawn_blocks(untrained(config), evaluator.draws), counted.append
    )
    return evaluator, model, evaluator.score("real images", evaluator.real()), counted


def finite(scores):
    """Every score is withheld with a reason, or lies in its finite interval; plain JSON."""
    json.dumps(scores, allow_nan=False)
    for name, score in scores.items():
        if "withheld" in score:
            assert score["withheld"], name
            assert "value" not in score
        else:
            assert score["low"] <= score["value"] <= score["high"], name
            assert score["interval"]
        assert score["count"] > 0
    return True


def test_every_score_is_there_with_its_interval(whole):
    """Set scores, caption match, Inception Score and retrieval in two spaces."""
    _, model, real, counted = whole
    spaces = {f"{space}/{score}" for space in ("pixels", "features") for score in RETRIEVAL}
    for drawn, of_set in ((model, SET_SCORES), (real, {"diversity_score"})):
        assert set(drawn.scores) == of_set | spaces | {"r_precision_score", "inception_score"}
        assert finite(drawn.scores)
    assert counted[-1] == 30
    assert "no classes" in model.scores["inception_score"]["withheld"]
    assert "FID needs at least" in model.scores["fid_error"]["withheld"]
    assert model.scores["r_precision_score"]["count"] == 30


def test_real_images_score_full_marks(whole):
    """The true images are first in both spaces, equal ones among them, and are their own set."""
    evaluator, _, real, _ = whole
    for space in ("pixels", "features"):
        assert real.ranks[space].tolist() == [1] * 30
        assert real.scores[f"{space}/top1_score"]["value"] == 1
    torch.testing.assert_close(
        real.features.read(0, 30),
        evaluator.reference.rows("test").read(0, 30),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_gallery_counts_equal_images_once(whole):
    """All images are in it, the test split first; the later of two equal ones is not counted."""
    evaluator = whole[0]
    test = load_split(evaluator.dataset, "test")
    assert len(evaluator.first) == 150
    assert int((~evaluator.first).sum()) == 3
    numbers = {test.keys[row]: int(found) for row, found in enumerate(evaluator.same[:30])}
    twins = sorted(row for row, key in enumerate(test.keys) if key in {"item-228", "item-229"})
    assert {numbers["item-228"], numbers["item-229"]} == {twins[0]}
    for space in evaluator.spaces.values():
        assert len(space) == 150
    vectors, _ = evaluator.network(test.pixels)
    torch.testing.assert_close(
        evaluator.spaces["features"].read(0, 30), vectors.clone(), rtol=1e-4, atol=1e-5
    )


def test_models_are_scored_on_what_they_draw(whole):
    """Features are of the model's images for the test captions, against the test reference."""
    evaluator, model, _, _ = whole
    test = load_split(evaluator.dataset, "test")
    assert evaluator.draws.captions == tuple(found[0] for found in test.captions)
    images = untrained(config_of()).of_data(list(evaluator.draws.captions))
    vectors, _ = evaluator.network(images)
    kept = Rows(feature_file(evaluator.folder, UNTRAINED), evaluator.network.dim)
    torch.testing.assert_close(kept.read(0, 30), vectors.clone(), rtol=1e-4, atol=1e-5)
    assert model.scores["kid_error"] == kid(evaluator.reference.rows("test"), kept).as_dict()
    drawn = pictures(untrained(config_of()), evaluator.draws, [3, 7])
    assert torch.equal(drawn, images[[3, 7]])


def test_caption_match_reads_the_drawn_images(whole):
    """The judge is asked for each image with its own caption and 99 of other images."""
    evaluator, model, real, _ = whole
    assert evaluator.chosen.shape == (30, 99)
    for drawn in (model, real):
        assert drawn.found.shape == (30,)
        assert set(drawn.found.tolist()) <= {0.0, 1.0}
        assert drawn.scores["r_precision_score"]["value"] == pytest.approx(
            float(drawn.found.mean())
        )
    texts = list(evaluator.draws.captions)
    told = [{evaluator.others[i] for i in row} for row in evaluator.chosen.tolist()]
    assert all(own not in others for own, others in zip(texts, told, strict=True))


def test_scoring_twice_gives_the_same(whole, tmp_path):
    """Nothing of one set of images is left for the next."""
    evaluator, model, _, _ = whole
    again = evaluator.score("again", drawn_blocks(untrained(config_of()), evaluator.draws))
    assert again.scores == model.scores
    parts = (b for n in range(30) for b in [drawn_one(evaluator, n)])
    single = evaluator.score("single", parts)
    assert torch.equal(single.ranks["pixels"], model.ranks["pixels"])
    assert single.scores["kid_error"]["value"] == pytest.approx(
        model.scores["kid_error"]["value"], rel=1e-3, abs=1e-6
    )


def drawn_one(evaluator, number):
    return pictures(untrained(config_of()), evaluator.draws, [number])


def test_class_table(whole):
    """A row a class of each label that has several, with its count and mean scores."""
    evaluator, model, _, _ = whole
    tables = class_table(evaluator.draws, model)
    assert set(tables) == {"parity"}
    rows = {row["class"]: row for row in tables["parity"]}
    assert {kind: row["images"] for kind, row in rows.items()} == {"even": 15, "odd": 15}
    odd = [
        n
        for n, row in enumerate(evaluator.draws.truth)
        if evaluator.draws.labels[row]["parity"] == "odd"
    ]
    assert rows["odd"]["top 5"] == pytest.approx(
        float((model.ranks["pixels"][odd] <= 5).double().mean())
    )
    assert rows["odd"]["caption match"] == pytest.approx(float(model.found[odd].mean()))
    assert class_table(evaluator.draws, model, most=1) == {}
    json.dumps(tables, allow_nan=False)


def test_noise_moves_the_images_of_a_model_that_has_some(whole):
    """One distance for each independent draw, 0 without noise; classes have means of theirs."""
    evaluator, model, real, _ = whole
    config = config_of()
    still = evaluator.noise_apart(model, blocks_again(untrained(config), evaluator.draws))
    assert still.tolist() == pytest.approx([0.0] * len(evaluator.independent), abs=1e-5)

    noisy = untrained(dataclasses.replace(config, student=StudentConfig(init="he", noise=4)))
    drawn = evaluator.score("noisy", drawn_blocks(noisy, evaluator.draws))
    moved = evaluator.noise_apart(drawn, blocks_again(noisy, evaluator.draws))
    assert len(moved) == len(evaluator.independent)
    assert bool((moved > 0).all())

    tables = class_table(evaluator.draws, drawn, real.features, moved)
    for line in tables["parity"]:
        chosen = [
            place
            for place, n in enumerate(evaluator.independent)
            if evaluator.draws.labels[evaluator.draws.truth[n]]["parity"] == line["class"]
        ]
        assert line["diversity, one caption"] == pytest.approx(float(moved[chosen].mean()))
        assert line["diversity, real"] > 0
    json.dumps(tables, allow_nan=False)


def test_captions_of_any_markup_are_scored(whole):
    """Markup, other scripts and very short captions are captions like any other."""
    assert set(MARKUP) < set(whole[0].draws.captions)
    assert not whole[1].features.read(0, 30).isnan().any()


def test_what_no_later_stage_reads_is_deleted(tmp_path):
    """Only the features of the sets remain in the folder."""
    config = config_of()
    evaluator = make_evaluator(tmp_path, make_inputs(tmp_path, plain()), config)
    evaluator.score("a set / of images", evaluator.real())
    evaluator.close()
    assert [p.name for p in evaluator.folder.iterdir()] == ["features-a-set-of-images.f32"]
    evaluator.close()


def test_too_few_captions_withhold_caption_match(tmp_path):
    """With 18 different captions there is no caption match; the table has none either."""
    evaluator = make_evaluator(tmp_path, make_inputs(tmp_path, plain()), config_of())
    found = evaluator.score("real", evaluator.real())
    assert found.found is None
    assert "needs 100 different captions" in found.scores["r_precision_score"]["withheld"]
    assert finite(found.scores)
    for rows in class_table(evaluator.draws, found).values():
        assert all(row["caption match"] is None for row in rows)


@pytest.mark.parametrize("protocol", ["authors", "gan"])
def test_every_protocol_repeats_true_images(tmp_path, protocol):
    """Real images come once a draw, in blocks no larger than a model's, and are all first."""
    config = config_of({"protocol": protocol, "captions": 8 if protocol == "gan" else None})
    evaluator = make_evaluator(tmp_path, make_inputs(tmp_path, plain(test=3)), config)
    blocks = list(evaluator.real())
    assert max(map(len, blocks)) <= 64
    test = load_split(evaluator.dataset, "test")
    assert torch.equal(torch.cat(blocks), test.pixels[list(evaluator.draws.truth)])
    assert len(evaluator.draws) == (8 if protocol == "gan" else 9)
    found = evaluator.score("real", evaluator.real())
    assert found.scores["features/top1_score"]["value"] == 1
    assert finite(found.scores)


def test_captions_of_one_image_are_no_rivals(tmp_path):
    """Under the authors' protocol an image's own other captions are not held against one."""
    records = [tiny_data.record(n) for n in range(90)]
    for n in range(100, 106):
        captions = tuple(f"picture {n}, caption {k}" for k in range(10))
        records.append(tiny_data.record(n, "test", captions=captions))
    config = config_of({"protocol": "authors"})
    evaluator = make_evaluator(tmp_path, make_inputs(tmp_path, records), config)
    assert evaluator.chosen.shape == (60, 99)
    for own, row in zip(evaluator.draws.captions, evaluator.chosen.tolist(), strict=True):
        image = own.split(",")[0]
        assert not any(evaluator.others[i].startswith(image + ",") for i in row)


def test_a_small_reference_changes_no_gallery_of_the_test_split(tmp_path):
    """With fewer reference images than test images all test images are still looked among."""
    inputs, config = make_inputs(tmp_path, plain(test=9)), config_of({"real_images": 4})
    evaluator = make_evaluator(tmp_path, inputs, config)
    assert len(evaluator.first) == 9 + 4 + 4
    found = evaluator.score("real", evaluator.real())
    assert found.ranks["features"].tolist() == [1] * 9
    assert found.scores["precision_score"]["count"] == 9
    assert found.scores["recall_score"]["count"] == 4


def test_baselines(tmp_path):
    """Blurs are always scored; where labels name tones the nearest training images are too."""
    evaluator = make_evaluator(tmp_path, make_inputs(tmp_path, toned()), config_of())
    found = baseline_scores(evaluator, evaluator.draws)
    assert set(found) == BLURS | {NEAREST, MEAN}
    for scores in found.values():
        assert set(scores) == {f"pixels/{name}" for name in RETRIEVAL}
        assert finite(scores)
    # A copied training image is nearest to itself, never to the true one.
    assert found[NEAREST]["pixels/top1_score"]["value"] == 0
    assert found[NEAREST]["pixels/median_rank"]["value"] > 1
    untoned = make_evaluator(
        tmp_path / "plain", make_inputs(tmp_path / "plain", plain()), config_of()
    )
    assert set(baseline_scores(untoned, untoned.draws)) == BLURS


def test_blur_of_a_flat_image_is_found_at_once(tmp_path):
    """Flat images are their own blurs, and so found first."""
    records = []
    for n, split in enumerate(["train"] * 3 + ["test"] * 3):
        flat = torch.full((32, 32, 3), 40 * n + 10, dtype=torch.uint8).numpy()
        records.append(tiny_data.record(n, split, image=tiny_data.encode(flat, "png")))
    evaluator = make_evaluator(tmp_path, make_inputs(tmp_path, records), config_of())
    for scores in baseline_scores(evaluator, evaluator.draws).values():
        assert scores["pixels/top1_score"]["value"] == 1


def test_a_reference_of_another_network_is_refused(tmp_path):
    """Other weights or another size of input are named, with what is to be done."""
    inputs, config = make_inputs(tmp_path, plain()), config_of()
    places = make_places(tmp_path, inputs, config)
    path = places["reference"] / REFERENCE
    about = path.read_text()
    for key, value in (("sha256", "0" * 64), ("input_px", 224)):
        changed = json.loads(about)
        changed["features"][key] = value
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"the reference in .* is of .*, not of .* delete"):
            make_evaluator(tmp_path, inputs, config, places)


def test_a_missing_judge_is_named(tmp_path):
    """Without the judge's file the error names it."""
    inputs, config = make_inputs(tmp_path, plain()), config_of()
    places = make_places(tmp_path, inputs, config)
    dataset = open_dataset(inputs.data)
    with pytest.raises(FileNotFoundError, match=r"judge\.safetensors"):
        open_evaluator(
            config.evaluation,
            dataset,
            plan_draws(dataset, config.evaluation),
            open_network(config.evaluation, inputs.teacher),
            places | {"judge": tmp_path},
            tmp_path,
        )


def test_no_validation_split_is_no_hindrance(tmp_path):
    """Evaluation needs train and test alone."""
    evaluator = make_evaluator(tmp_path, make_inputs(tmp_path, plain(validation=0)), config_of())
    found = evaluator.score("real", evaluator.real())
    assert found.scores["pixels/top1_score"]["value"] == 1


def test_three_images_are_scored_as_far_as_they_go(tmp_path):
    """The fewest captions that can be asked for: what needs more is withheld with its reason."""
    config = config_of({"captions": 3})
    evaluator = make_evaluator(tmp_path, make_inputs(tmp_path, plain()), config)
    assert len(evaluator.draws) == 3
    found = evaluator.score("real", evaluator.real())
    assert finite(found.scores)
    assert "withheld" in found.scores["diversity_score"]
    assert math.isfinite(found.scores["kid_error"]["value"])


def test_weights_in_memory_are_those_drawn_with():
    """None draws the untrained student, other weights draw other images."""
    config = config_of()
    encoder = new_encoder(config.captions)
    weights = {k: v * 1.2 for k, v in new_student(config).state_dict().items()}
    before = synthesizer_of(config, encoder, None)(["a bird"])
    assert torch.equal(
        before, synthesizer_of(config, encoder, new_student(config).state_dict())(["a bird"])
    )
    assert not torch.equal(before, synthesizer_of(config, encoder, weights)(["a bird"]))


def test_a_model_in_memory_draws_with_its_noise_scale():
    """Trials are ranked on what the finished model would draw."""
    student = dataclasses.replace(config_of().student, noise=4, noise_scale=2.0)
    config = dataclasses.replace(config_of(), student=student)
    drawn = synthesizer_of(config, new_encoder(config.captions), None)
    assert torch.equal(drawn(["a bird"]), drawn(["a bird"], noise_scale=2.0))
    assert not torch.equal(drawn(["a bird"]), drawn(["a bird"], noise_scale=1.0))


def test_probe_embedding_without_labels(tmp_path):
    """Tones are probed where labels have more than one known one; else there is no probe."""
    for name, records in (("toned", toned()), ("plain", plain()), ("none", plain(validation=0))):
        inputs = make_inputs(tmp_path / name, records)
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
    assert open_encoder(inputs.captions / ENCODER).config == encoder.config

"""What trials are ranked on: what it follows, what it never reads, and who gains on whom."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny_data
import torch
from evaluated import config_of, make_inputs

from sdn.config import LossWeights, SearchConfig, StageConfig
from sdn.data.dataset import open_dataset
from sdn.data.images import encode
from sdn.data.loader import load_split
from sdn.features.networks import open_network
from sdn.features.rows import HeldRows
from sdn.reference import open_reference, write_reference
from sdn.scores.kernel import kid
from sdn.stage_run import new_student, run_stage
from sdn.validation import Validation, pack_parts, unpack_parts

TRAIN, HELD = 24, 12
KINDS = ("kid", "retrieval")


def orange(number):
    """A PNG of a tone of orange and a little noise, each image another: soon learned."""
    random = np.random.default_rng(number)
    pixels = (
        np.array([150, 70, 0]) + random.integers(0, 50, 3) + random.integers(0, 50, (32, 32, 3))
    )
    return encode(pixels.astype(np.uint8), "png")


def records(train=TRAIN, held=HELD, test=5, other_test=False):
    """Images of a tone each; `other_test` changes those of the test split and nothing else."""
    names = ["train"] * train + ["validation"] * held + ["test"] * test
    return [
        tiny_data.record(n, split, image=orange(n + 1000 * (other_test and split == "test")))
        for n, split in enumerate(names)
    ]


def ready(folder, items=None, evaluation=None):
    """Inputs and the folder of the reference."""
    inputs = make_inputs(folder, records() if items is None else items)
    config = config_of(evaluation)
    reference = folder / "reference"
    reference.mkdir()
    network = open_network(config.evaluation, inputs.teacher)
    write_reference(reference, inputs.data, network, config.evaluation)
    return inputs, reference


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Inputs of 24 training and 12 validation images, and their reference."""
    return ready(tmp_path_factory.mktemp("validation"))


def searching(kind, captions=256, **changes):
    return config_of(search=SearchConfig(score=kind, captions=captions), **changes)


def untrained(factor=1.0):
    student = new_student(config_of())
    return {name: value * factor for name, value in student.state_dict().items()}


@pytest.fixture(scope="module")
def trained(places):
    """The weights of a student that has learned the tones a little."""
    stage = StageConfig(
        epochs=40,
        global_batch=8,
        rate=5e-3,
        precision="float32",
        weights=LossWeights(image=20),
        scale="relative",
    )
    config = config_of(stage_one=stage, lanes=8)
    return run_stage("stage_one", config, places[0]).weights()


class Drawing:
    """A model that draws given pixels, whatever it is asked for."""

    def __init__(self, pixels):
        self.pixels, self.asked = pixels, []

    def of_data(self, captions):
        start = len(self.asked)
        self.asked += captions
        return self.pixels[start : start + len(captions)]


def standing_of(monkeypatch, validation, pixels):
    """How whoever draws these pixels stands, and the captions that were drawn."""
    model = Drawing(pixels)
    with monkeypatch.context() as patch:
        patch.setattr("sdn.validation.synthesizer_of", lambda *arguments: model)
        return validation({}), model.asked


def test_captions_are_the_first_of_each_validation_image(places, monkeypatch):
    """One caption an image, in the order of the split, block by block."""
    monkeypatch.setattr("sdn.validation._BATCH", 5)
    held = load_split(places[0].data, "validation")
    for kind in KINDS:
        validation = Validation(searching(kind), *places)
        found, asked = standing_of(monkeypatch, validation, held.pixels)
        assert asked == validation.captions == [options[0] for options in held.captions]
        assert len(found.parts) == found.score.count == HELD


def test_kid_is_of_the_drawn_images_features(places):
    """Against the features of all validation images, computed anew."""
    inputs, _ = places
    validation = Validation(searching("kid", captions=7), *places)
    found = validation(untrained())
    network = open_network(config_of().evaluation, inputs.teacher)
    real = network(load_split(inputs.data, "validation").pixels)[0]
    assert found.parts.shape == (7, real.shape[1])
    assert found.parts.dtype == torch.float32
    expected = kid(HeldRows(real), HeldRows(found.parts))
    assert found.score.value == pytest.approx(expected.value, abs=1e-9)
    assert found.score.low < found.score.value < found.score.high


def test_true_images_are_found_at_once(places, monkeypatch):
    """A student that draws the true images has reciprocal rank 1 for each caption."""
    validation = Validation(searching("retrieval"), *places)
    held = load_split(places[0].data, "validation")
    found, _ = standing_of(monkeypatch, validation, held.pixels)
    assert found.score.value == 1
    assert found.parts.shape == (HELD, 1)
    assert torch.equal(found.parts, torch.ones(HELD, 1))


def test_reciprocal_ranks_are_among_validation_and_training_images(places, monkeypatch):
    """Each part is one over the place of the true image among all of both splits, by distance."""
    held, train = (load_split(places[0].data, name).pixels for name in ("validation", "train"))
    drawn = held.flip(0)
    validation = Validation(searching("retrieval"), *places)
    found, _ = standing_of(monkeypatch, validation, drawn)
    gallery = torch.cat([held, train]).double().flatten(1)
    distances = torch.cdist(drawn.double().flatten(1), gallery)
    ranks = [1 + int((row < row[n]).sum()) for n, row in enumerate(distances)]
    assert max(ranks) > HELD  # training images come between
    expected = torch.tensor([1 / rank for rank in ranks])
    torch.testing.assert_close(found.parts.squeeze(1), expected)
    assert found.score.value == pytest.approx(float(expected.mean()))


def test_equal_images_count_once(tmp_path, monkeypatch):
    """A validation image with copies in both splits is first, and its copies worsen no rank."""
    items = records(train=6, held=0, test=2)
    items += [tiny_data.record(50 + n, image=items[0].image) for n in range(5)]
    items += [
        tiny_data.record(60, "validation", image=items[0].image),
        tiny_data.record(61, "validation", image=items[0].image),
        tiny_data.record(62, "validation", image=orange(62)),
    ]
    inputs = make_inputs(tmp_path, items)
    held = load_split(inputs.data, "validation")
    validation = Validation(searching("retrieval"), inputs, tmp_path)
    found, _ = standing_of(monkeypatch, validation, held.pixels)
    assert found.parts.flatten().tolist() == [1, 1, 1]
    # The other one's caption draws the image with eight copies: behind one image, not behind eight.
    row, copy = held.keys.index("item-62"), held.keys.index("item-60")
    pixels = held.pixels.clone()
    pixels[row] = pixels[copy]
    found, _ = standing_of(monkeypatch, validation, pixels)
    others = [value for n, value in enumerate(found.parts.flatten().tolist()) if n != row]
    assert others == [1, 1]
    gallery = torch.cat([load_split(inputs.data, "train").pixels, held.pixels]).double()
    gallery = gallery.flatten(1).unique(dim=0)
    distances = (gallery - pixels[row].double().flatten()).norm(dim=1)
    true = (held.pixels[row].double() - pixels[row].double()).norm()
    assert found.parts[row].item() == pytest.approx(1 / (1 + int((distances < true).sum())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("asked", "drawn"), [(6, 6), (HELD, HELD), (HELD + 1, HELD), (999, HELD)])
def test_captions_up_to_the_length_of_the_split(places, kind, asked, drawn):
    """Fewer captions than the split are its first ones; more than there are is all."""
    found = Validation(searching(kind, captions=asked), *places)(untrained())
    whole = Validation(searching(kind), *places)(untrained())
    assert found.score.count == len(found.parts) == drawn
    assert torch.equal(found.parts, whole.parts[:drawn])


def test_a_small_reference_is_no_limit_to_the_captions(tmp_path):
    """Where the reference holds fewer real images, all captions are drawn all the same."""
    places = ready(tmp_path, evaluation={"real_images": 8})
    found = Validation(searching("kid"), *places)(untrained())
    assert found.score.count == HELD
    assert open_reference(places[1]).about["images"]["validation"] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_loss_weights_change_no_score(places, kind):
    """The same student stands the same, whatever its trial's stages were configured with."""
    config = searching(kind)
    other = StageConfig(
        weights=LossWeights(image=99, conv5=0.1), rate=0.1, epochs=7, scale="relative"
    )
    changed = dataclasses.replace(
        config, stage_two=other, stage_one=dataclasses.replace(other, global_batch=4)
    )
    here, there = (Validation(c, *places)(untrained(1.2)) for c in (config, changed))
    assert here.score == there.score
    assert torch.equal(here.parts, there.parts)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_follow_the_weights_alone(places, trained, kind):
    """One object scores one student after another; the same again is the same."""
    validation = Validation(searching(kind), *places)
    first, other, again = map(validation, (untrained(), trained, untrained()))
    assert not torch.equal(first.parts, other.parts)
    assert first.score == again.score
    assert torch.equal(first.parts, again.parts)
    assert first.score.value == Validation(searching(kind), *places)(untrained()).score.value


@pytest.mark.parametrize("kind", KINDS)
def test_the_test_split_is_not_read(tmp_path, kind):
    """The score is the same with the test split's files gone, of the data and of the reference."""
    inputs, reference = ready(tmp_path)
    before = Validation(searching(kind), inputs, reference)(untrained())
    for shard in open_dataset(inputs.data).shards("test"):
        stem = shard.name.rsplit("/", 1)[-1].split(".", 1)[0]
        found = [path for path in inputs.data.rglob("*") if path.stem == stem]
        assert found
        for path in found:
            path.unlink()
    (reference / "test.f32").unlink()
    with pytest.raises(Exception, match="test"):
        load_split(inputs.data, "test")
    after = Validation(searching(kind), inputs, reference)(untrained())
    assert after.score == before.score
    assert torch.equal(after.parts, before.parts)


@pytest.mark.parametrize("kind", KINDS)
def test_other_test_images_change_no_score(places, tmp_path, kind):
    """Data sets that differ in their test images alone rank students the same."""
    others = ready(tmp_path, records(other_test=True))
    digests = [open_reference(found[1]).about["digest"] for found in (places, others)]
    assert digests[0] != digests[1]
    scores = [Validation(searching(kind), *found)(untrained()).score for found in (places, others)]
    assert scores[0] == scores[1]


def test_retrieval_needs_no_reference(places, tmp_path):
    """Images are compared in pixels: no feature network is opened."""
    inputs = places[0]
    found = Validation(searching("retrieval"), inputs, tmp_path / "none")(untrained())
    assert found.score == Validation(searching("retrieval"), *places)(untrained()).score
    with pytest.raises(FileNotFoundError, match="no reference"):
        Validation(searching("kid"), inputs, tmp_path / "none")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [0, 2])
def test_too_few_validation_images_are_refused_at_once(tmp_path, kind, held):
    """Without a validation split, or one of which no gain can be told, no student is drawn."""
    places = ready(tmp_path, records(train=6, held=held, test=3))
    with pytest.raises(ValueError, match=rf"has {held} validation images, .* at least 3"):
        Validation(searching(kind), *places)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_gains_nothing_on_itself(places, kind):
    """Gain 0 and p 1."""
    validation = Validation(searching(kind), *places)
    parts = validation(untrained()).parts
    found = validation.gain(parts, parts.clone())
    assert found.gain.value == 0
    assert found.p_value == 1
    assert found.needed is None
    assert found.gain.count == HELD


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_student_gains_on_an_untrained_one(places, trained, kind):
    """What has learned the tones stands better, and the gain is the difference of the scores."""
    validation = Validation(searching(kind), *places)
    before, after = validation(untrained()), validation(trained)
    found = validation.gain(before.parts, after.parts)
    sign = -1 if kind == "kid" else 1
    assert found.gain.value == pytest.approx(
        sign * (after.score.value - before.score.value), rel=1e-4, abs=1e-6
    )
    back = validation.gain(after.parts, before.parts)
    assert back.gain.value == pytest.approx(-found.gain.value)
    if kind == "kid":  # of retrieval 12 captions say little
        assert found.p_value < 0.01
        assert back.p_value > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_real_images_gain_on_any_student(places, monkeypatch, kind):
    """Who draws the true images is better beyond chance, and the other way round is not."""
    validation = Validation(searching(kind), *places)
    held = load_split(places[0].data, "validation")
    own = validation(untrained())
    best, _ = standing_of(monkeypatch, validation, held.pixels)
    assert (best.score.value < own.score.value) == (kind == "kid")
    found = validation.gain(own.parts, best.parts)
    assert found.gain.low > 0
    assert found.p_value < 0.01
    assert validation.gain(best.parts, own.parts).p_value > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_parts_kept_as_bytes_say_the_same(places, kind):
    """What is written down of a trial and read again gives the very same gain."""
    validation = Validation(searching(kind), *places)
    own, other = (validation(untrained(factor)).parts for factor in (1.0, 1.2))
    again = [unpack_parts(pack_parts(parts)) for parts in (own, other)]
    assert validation.gain(*again) == validation.gain(own, other)


@pytest.mark.parametrize("shape", [(1, 1), (12, 1), (5, 7), (3, 1280)])
def test_parts_survive_packing(shape):
    """Rows come back as they were, bit by bit, of any layout, and can be changed."""
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts[0, 0] = -0.0
    for given in (parts, parts.T.contiguous().T, parts.double()):
        found = unpack_parts(pack_parts(given))
        assert found.dtype == torch.float32
        assert found.numpy().tobytes() == parts.numpy().tobytes()
        assert found.shape == shape
        found.zero_()
    assert len(pack_parts(parts)) == 8 + 4 * parts.numel()


def header(dim):
    return np.int64(dim).tobytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        header(3),
        header(0) + bytes(12),
        header(-3) + bytes(12),
        header(3) + bytes(11),
        header(3) + bytes(16),
        header(2**62) + bytes(12),
        pack_parts(torch.ones(4, 5))[:-1],
        pack_parts(torch.ones(4, 5))[1:],
        pack_parts(torch.ones(4, 5)) + b"x",
    ],
)
def test_damaged_parts_are_refused(data):
    """Bytes that hold no whole rows, or none at all, are a ValueError with their number."""
    with pytest.raises(ValueError, match=rf"^{len(data)} bytes are no whole rows of -?\d+ numbers"):
        unpack_parts(data)

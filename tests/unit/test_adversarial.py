"""Stage three: critics on the teacher's taps."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from test_training import assert_same, batch_of, config_of, embed, make_inputs

from sdn.adversarial import AdversarialTrainer
from sdn.checking import check_config
from sdn.config import AdversarialConfig, StudentConfig, from_dict, to_dict, with_overrides
from sdn.ranks import Rank
from sdn.stage_run import TAP_MEANS, TEACHER, new_student, run_stage, stage_plan, steps_of
from sdn.teacher import open_teacher


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folders with a data set, a teacher and a caption encoder."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def third_config(width=1.0, **changes):
    """A run whose stage three has noise and two critics."""
    values = {"epochs": 2.0, "global_batch": 4, "rate": 1e-3, "precision": "float32"}
    values |= {"critics": {"pool2": 1.0, "pool4": 1.0}, "critic_width": 8, "checkpoint_images": 8}
    return dataclasses.replace(
        config_of(),
        student=StudentConfig(init="he", noise=3, width=width),
        stage_three=AdversarialConfig(**(values | changes)),
    )


def trainer_of(inputs, **changes):
    config = third_config(**changes)
    return AdversarialTrainer(
        new_student(config),
        open_teacher(inputs.teacher / TEACHER),
        config.stage_three,
        steps=10,
        tap_means=json.loads((inputs.teacher / TAP_MEANS).read_text()),
        precision="float32",
    )


def step(trainer, number=0, count=3):
    batch = batch_of(number, count)
    return trainer.advance(batch, embed(batch.captions), count)


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, set()),
        ({"diversity": 0.5}, {"diversity"}),
        ({"augment": "differentiable"}, set()),
        ({"width": 0.5}, set()),
    ],
    ids=["plain", "diversity", "augment", "narrow"],
)
def test_both_sides_move(inputs, changes, more):
    """Each step changes student and critics, never the teacher; its terms are named and finite."""
    trainer = trainer_of(inputs, **changes)
    networks = {"student": trainer.student, "critics": trainer.critics, "teacher": trainer.teacher}
    before = {
        name: {k: v.clone() for k, v in network.named_parameters()}
        for name, network in networks.items()
    }
    terms, norm = step(trainer)
    assert terms.keys() == {"critics", "adversary", *more, *trainer.teacher.names}
    assert all(term.isfinite() and not term.requires_grad for term in terms.values())
    assert norm > 0
    moved = {
        name: any(not torch.equal(v, before[name][k]) for k, v in network.named_parameters())
        for name, network in networks.items()
    }
    assert moved == {"student": True, "critics": True, "teacher": False}
    assert all(p.requires_grad for p in trainer.critics.parameters())


def test_without_critics_it_is_stage_two(inputs):
    """A weight of 0 leaves the distances of images in range: the gradient is that of stage two."""
    trainer, again = (trainer_of(inputs, adversary=0.0) for _ in range(2))
    for one in (trainer, again):
        one.student.convs["image"].weight.data.mul_(0.1)
    batch = batch_of()
    text = embed(batch.captions)
    step(trainer)
    found = [p.grad.clone() for p in trainer.student.parameters()]
    from sdn.data.images import to_image

    terms = again.losses(again.coded(batch, text), to_image(batch.pixels))
    expected = torch.autograd.grad(sum(terms.values()), [*again.student.parameters()])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-7)


def test_noise_is_used_under_the_diversity_term(inputs):
    """Images of one caption move apart; without the term they hardly do."""

    def apart(trainer):
        for number in range(60):
            step(trainer, number)
        batch = batch_of()
        text = embed(batch.captions)
        one, other = (trainer.coded(batch, text, of=word) for word in ("a", "b"))
        with torch.inference_mode():
            images = [trainer.student(code, ("image",))["image"] for code in (one, other)]
        return float((images[0] - images[1]).abs().mean())

    assert apart(trainer_of(inputs, diversity=0.1)) > 2 * apart(trainer_of(inputs))


def test_a_critic_sees_another_caption(inputs):
    """Never the image's own, however it is written and rounded; none where there is no other."""
    trainer = trainer_of(inputs, global_batch=5)
    captions = ("A house", "a cat", "a  HOUSE!", "a dog", "a cat")
    texts = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    text = texts[[0, 1, 0, 2, 1]]
    text[2] *= 1 + 1e-6  # as on a GPU, where it depends on the captions beside it

    def mismatched(step, rows):
        given = tuple(captions[row] for row in rows)
        batch = dataclasses.replace(batch_of(step, len(rows)), captions=given)
        return trainer._mismatched(batch, text[rows])

    def near(one, other):
        return torch.allclose(one, other, rtol=1e-5)

    orders = set()
    for number in range(9):
        found = mismatched(number, [0, 1, 2, 3, 4])
        for row in range(5):
            assert not near(found[row], text[row])
            assert any(torch.equal(found[row], known) for known in text)
        orders.add(near(found[0], text[1]))
    assert orders == {True, False}  # each follows the first in some step
    assert mismatched(0, [0, 2]) is None


class Heard:
    """The words of a rank: notes what it says, and answers with what all ranks said before."""

    def __init__(self, *before):
        self.said, self._answers = [], [torch.stack(one) for one in zip(*before, strict=True)]

    def together(self, value):
        self.said.append(value)
        return self._answers[len(self.said) - 1] if self._answers else value.unsqueeze(0)


@pytest.mark.parametrize("shares", [[(0, 2, 4), (1, 3, 5)], [(0, 1, 2, 3, 4, 5), ()]])
def test_ranks_see_the_other_captions_that_one_rank_sees(inputs, shares):
    """However a batch is shared out, an image's mismatched caption is the same."""
    text = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    trainer = trainer_of(inputs, global_batch=6)

    def mismatched(number, rows, words):
        kept = list(rows) or [0]  # a rank without a sample keeps the others company
        batch = dataclasses.replace(
            batch_of(number, len(kept)),
            captions=tuple(f"caption {row}" for row in kept),
            keys=tuple(f"key-{row}" for row in rows),
        )
        trainer._rank = Rank(together=words.together)
        return trainer._mismatched(batch, text[kept])

    for number in range(3):
        whole = mismatched(number, range(6), Heard())
        ranks = [Heard(), Heard()]
        for rows, words in zip(shares, ranks, strict=True):
            mismatched(number, rows, words)
        for rows in filter(None, shares):
            found = mismatched(number, rows, Heard(*(words.said for words in ranks)))
            assert torch.equal(found, whole[list(rows)])


def test_it_goes_on_where_it_was(inputs):
    """From a checkpoint in the middle to the same bits, the critics' too."""
    changes = {"augment": "differentiable", "diversity": 0.1}
    whole, first = trainer_of(inputs, **changes), trainer_of(inputs, **changes)
    for number in range(6):
        step(whole, number)
    for number in range(3):
        step(first, number)
    second = trainer_of(inputs, **changes)
    second.restore(first.checkpoint())
    for number in range(3, 6):
        step(second, number)
    assert_same(second.checkpoint().model, whole.checkpoint().model)
    assert_same(second.checkpoint().critics, whole.checkpoint().critics)


def test_a_whole_stage(inputs):
    """From folders to a student, through the same loop as the other stages."""
    config = third_config()
    trainer = run_stage("stage_three", config, inputs)
    plan = stage_plan(config, config.stage_three, inputs.data)
    assert trainer.step == steps_of(config.stage_three, plan) > 2
    assert trainer.checkpoint().critics is not None


def test_it_survives_json():
    """As all of a config."""
    config = third_config(critics={"pool5": 2.0})
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
    assert with_overrides(config, {"stage_three.adversary": "3"}).stage_three.adversary == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "fp16"}, "cannot share one scale"),
        ({"accumulate": 2}, "accumulate must be 1"),
        ({"critics": {"pool5": -1.0}}, "critics.pool5 must be >= 0"),
        ({"critics": {"pool5": float("inf")}}, "critics.pool5 must be >= 0 and finite"),
        ({"critics": {"image": 1.0}}, "critics see with the teacher's eyes alone"),
        ({"adversary": float("inf")}, "adversary must be >= 0 and finite"),
        ({"critics": {}}, "critics must have one that is > 0, not {}"),
        ({"critics": {}, "adversary": 0.0}, "critics must have one"),
        ({"critic_rate": 0.0}, "critic_rate"),
        ({"diversity": -1.0}, "diversity must be >= 0"),
        ({"global_batch": 1}, "global_batch must be >= 2"),
        ({"compile": "on"}, "never compiled"),
    ],
)
def test_what_cannot_work_is_refused(changes, words):
    """With the key in the text."""
    with pytest.raises(ValueError, match=words):
        third_config(**changes)


def test_diversity_needs_noise():
    """One caption has one image without it."""
    config = third_config(diversity=1.0)
    with pytest.raises(ValueError, match=r"1\.0.*needs student\.noise.*stage_three\.diversity=0"):
        dataclasses.replace(config, student=StudentConfig())


def test_a_critic_of_no_tap_is_refused_before_anything_is_trained():
    """vgg11 has no third convolution in its third block; without a stage three nobody asks."""
    config = third_config(critics={"conv3_3": 1.0})
    with pytest.raises(ValueError, match=r"stage_three\.critics.*no tap conv3_3.*conv3_2"):
        check_config(config)
    off = dataclasses.replace(config.stage_three, epochs=0.0)
    check_config(dataclasses.replace(config, stage_three=off))
    check_config(third_config())


def test_ranks_may_be_as_many_as_images():
    """Of a batch; more are refused, where there is a stage three."""
    config = third_config(global_batch=4)
    fewer = {"stage_one": config.stage_one, "stage_two": config.stage_two}
    fewer = {name: dataclasses.replace(stage, global_batch=8) for name, stage in fewer.items()}
    dataclasses.replace(config, workers=4, lanes=48, **fewer)
    with pytest.raises(ValueError, match=r"workers \(8\) must be at most stage_three"):
        dataclasses.replace(config, workers=8, lanes=48, **fewer)
    off = dataclasses.replace(config.stage_three, epochs=0.0)
    dataclasses.replace(config, workers=8, lanes=48, stage_three=off, **fewer)

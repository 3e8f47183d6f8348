"""Fitting a teacher on labels or caption words, and folding its batch norms away."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from sdn.config import TeacherConfig
from sdn.data.images import to_image
from sdn.fit import one_cycle
from sdn.fitting import targets_like
from sdn.taps import blocks_of
from sdn.teacher import Teacher
from sdn.teacher_fitting import (
    WORDS,
    Classifier,
    Targets,
    fit_teacher,
    head_accuracy,
    heads_loss,
    tap_means,
    targets_of,
)

COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}
CONFIG = TeacherConfig(
    arch="vgg11", width=0.0625, convention="symmetric", epochs=6, batch=16, rate=5e-3
)


def toy(per_class=20, seed=0):
    """Noisy flat colours, shuffled: pixels (N, 3, 32, 32) uint8 and the colours' names."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in COLOURS for _ in range(per_class)]
    names = [names[i] for i in torch.randperm(len(names), generator=generator)]
    flat = torch.tensor([COLOURS[name] for name in names], dtype=torch.float32)
    noise = torch.randn(len(names), 3, 32, 32, generator=generator) * 30
    return (flat.view(-1, 3, 1, 1) + noise).clamp(0, 255).to(torch.uint8), names


def labelled(names, **more):
    return [{"colour": name, **more} for name in names]


def captioned(names):
    return [(f"a {name} square",) for name in names]


def worn_classifier(arch, convention, seed=0):
    """A classifier whose batch norms have seen data and have factors and shifts of their own."""
    torch.manual_seed(seed)
    model = Classifier(Teacher(blocks_of(arch, 0.0625), convention), 32, {"colour": 3})
    for norm in model.norms.values():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.3, 0.6)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(8, 3, 32, 32) * 2 - 1)
    return model.eval()


@pytest.mark.parametrize("arch", ["vgg11", "vgg19"])
@pytest.mark.parametrize("convention", ["symmetric", "imagenet", "release"])
@torch.no_grad()
def test_folded_teacher_gives_the_classifiers_taps(arch, convention):
    """After fold() every tap is what the classifier computes in eval mode, to 1e-4."""
    model = worn_classifier(arch, convention)
    expected = {}
    for name, norm in model.norms.items():
        norm.register_forward_hook(
            lambda _, __, out, name=name: expected.__setitem__(name, out.clamp(min=0))
        )
    image = torch.rand(4, 3, 32, 32) * 2 - 1
    logits = model(image)["colour"]
    blocks = model.teacher.blocks
    for k, (_, convolutions) in enumerate(blocks, start=1):
        expected[f"pool{k}"] = functional.avg_pool2d(expected[f"conv{k}_{convolutions}"], 2)
    teacher = model.fold()
    taps = teacher(image)
    assert set(taps) == {*expected, "image"}
    for name, tap in expected.items():
        assert tap.any(), name
        torch.testing.assert_close(taps[name], tap, rtol=1e-4, atol=1e-4, msg=name)
    head = functional.linear(taps["pool5"].flatten(1), *head_of(model))
    torch.testing.assert_close(head, logits, rtol=1e-4, atol=1e-4)


def head_of(model):
    (linear,) = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return linear.weight, linear.bias


def test_folded_teacher_is_frozen_and_without_batch_norm():
    """fold() returns a teacher of the configured convention with no norm and nothing to train."""
    teacher = worn_classifier("vgg11", "release").fold()
    assert isinstance(teacher, Teacher)
    assert teacher.convention == "release"
    assert not any(isinstance(m, nn.BatchNorm2d) for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().training


def test_fitting_learns_a_toy_set_above_chance():
    """Fitted on three colours, the classifier tells new images' colours; the loss has fallen."""
    pixels, names = toy()
    steps = []
    model = fit_teacher(
        pixels,
        targets_of(labelled(names), captioned(names)),
        CONFIG,
        lambda step, loss: steps.append((step, loss)),
    )
    new, new_names = toy(per_class=8, seed=1)
    accuracy = head_accuracy(model, new, targets_of(labelled(new_names), captioned(new_names)))
    assert set(accuracy) == {"colour"}
    assert accuracy["colour"] > 0.8  # chance is 1/3
    assert [step for step, _ in steps] == list(range(1, 6 * (60 // 16) + 1))
    assert steps[-1][1] < 0.5 * steps[0][1]
    assert not model.training


def test_fitting_on_words_learns_above_the_commonest_answer():
    """Without labels the words head learns which captions name which colour."""
    pixels, names = toy()
    targets = targets_of([{}] * len(names), captioned(names))
    model = fit_teacher(pixels, targets, CONFIG)
    accuracy = head_accuracy(model, pixels, targets)
    assert set(accuracy) == {WORDS}
    assert accuracy[WORDS] > 0.85  # saying no to every word is right two times in three


def test_fitting_follows_its_seed_and_leaves_the_global_generator_alone():
    """Equal seeds give bit-for-bit equal teachers; the caller's random numbers go on unchanged."""
    pixels, names = toy(per_class=8)
    targets = targets_of(labelled(names), captioned(names))
    config = TeacherConfig(arch="vgg11", width=0.03, convention="symmetric", epochs=1, batch=8)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = fit_teacher(pixels, targets, config).fold().state_dict()
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    second = fit_teacher(pixels, targets, config).fold().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_labels_make_one_head_each_with_sorted_classes():
    """Each label name becomes a head of its sorted classes, images without it get -100."""
    labels = [{"colour": c} for c in ["red", "blue"] * 4]
    labels += [{"colour": "red", "size": s} for s in ["small", "large"] * 4]
    targets = targets_of(labels, [("x",)] * 16)
    assert targets.classes == {"colour": ("blue", "red"), "size": ("large", "small")}
    assert targets.values["colour"].tolist() == [1, 0] * 4 + [1] * 8
    assert targets.values["size"].tolist() == [-100] * 8 + [1, 0] * 4
    assert targets.values["size"].dtype == torch.int64


def test_classes_below_four_images_are_ignored():
    """A class on three images is no class: its images count as without a label; four are enough."""
    names = ["red"] * 4 + ["green"] * 3 + ["blue"] * 5
    targets = targets_of(labelled(names), captioned(names))
    assert targets.classes == {"colour": ("blue", "red")}
    assert targets.values["colour"].tolist() == [1] * 4 + [-100] * 3 + [0] * 5


def test_a_label_of_a_single_class_is_no_head():
    """A label that is the same everywhere teaches nothing and is left out."""
    names = ["red"] * 4 + ["blue"] * 4
    targets = targets_of(labelled(names, shape="square"), captioned(names))
    assert list(targets.classes) == ["colour"]


def test_words_head_without_labels():
    """Without labels the head reads words on at least four images and not on all of them."""
    captions = (
        [("A red bird.", "one red wing")] * 4 + [("a blue bird",)] * 5 + [("a green bird",)] * 3
    )
    targets = targets_of([{}] * 12, captions)
    # "a" and "bird" stand everywhere, "green" on three images only.
    assert targets.classes == {WORDS: ("blue", "one", "red", "wing")}
    assert targets.values[WORDS].tolist() == (
        [[0, 1, 1, 1]] * 4 + [[1, 0, 0, 0]] * 5 + [[0, 0, 0, 0]] * 3
    )
    assert targets.values[WORDS].dtype == torch.float32


def test_labels_that_support_no_head_leave_the_words():
    """Where every class is too small, the words of the captions are read instead."""
    labels = [{"name": f"image {i}"} for i in range(8)]
    targets = targets_of(labels, [("red",)] * 4 + [("blue",)] * 4)
    assert targets.classes == {WORDS: ("blue", "red")}


@pytest.mark.parametrize(
    ("labels", "captions"),
    [
        ([{}] * 8, [("the same",)] * 8),
        ([{}] * 8, [(f"word{i}",) for i in range(8)]),
        ([{"colour": "red"}] * 8, [("the same",)] * 8),
        ([{"colour": c} for c in ("red", "blue", "red")], [("a",), ("b",), ("a",)]),
        ([], []),
    ],
)
def test_nothing_to_fit_on_is_refused(labels, captions):
    """With neither a label nor a word to tell images apart, the error says so and what to do."""
    with pytest.raises(
        ValueError, match=rf"nothing to fit .*of the {len(labels)} .*set teacher\.weights"
    ):
        targets_of(labels, captions)


@pytest.mark.parametrize("name", ["type", "a.b", "keys", "training", "", "words", "teacher"])
def test_any_label_name_can_be_fitted(name):
    """Label names come from the user's files; none of them collides with a module's attributes."""
    pixels, colours = toy(per_class=5)
    targets = targets_of([{name: colour} for colour in colours], captioned(colours))
    assert targets.classes == {name: ("blue", "green", "red")}
    config = TeacherConfig(arch="vgg11", width=0.03, convention="symmetric", epochs=1, batch=5)
    accuracy = head_accuracy(fit_teacher(pixels, targets, config), pixels, targets)
    assert list(accuracy) == [name]
    assert 0 <= accuracy[name] <= 1


@pytest.mark.parametrize("name", ["colour", "words"])
def test_another_split_gets_the_training_splits_classes(name):
    """Held-out labels are numbered as in training; a class that training lacked counts as none."""
    targets = targets_of([{name: c} for c in ["red", "blue"] * 4], [("x",)] * 8)
    held = SimpleNamespace(labels=({name: "red"}, {name: "green"}, {}, {name: "blue"}), captions=())
    found = targets_like(targets, held)
    assert found.classes == {name: ("blue", "red")}
    assert found.values[name].tolist() == [1, -100, -100, 0]


def test_another_split_gets_the_training_splits_words():
    """Held-out captions are read for training's words; words that training lacked are ignored."""
    targets = targets_of([{}] * 8, [("red",)] * 4 + [("blue",)] * 4)
    held = SimpleNamespace(labels=({}, {}), captions=(("A RED door", "green"), ("green",)))
    assert targets_like(targets, held).values[WORDS].tolist() == [[0, 1], [0, 0]]


def test_heads_loss_equals_the_formula():
    """Cross entropy over rows with a class, summed over heads; words by root of their number."""
    torch.manual_seed(0)
    logits = {"colour": torch.randn(4, 3), "size": torch.randn(4, 2), WORDS: torch.randn(4, 9)}
    words = (torch.rand(4, 9) > 0.5).float()
    values = {
        "colour": torch.tensor([2, -100, 0, 1]),
        "size": torch.full((4,), -100),
        WORDS: words,
    }
    rows = logits["colour"].log_softmax(1)
    colour = -(rows[0, 2] + rows[2, 0] + rows[3, 1]) / 3
    p = logits[WORDS].sigmoid()
    binary = -(words * p.log() + (1 - words) * (1 - p).log()).mean() * 3
    assert heads_loss(logits, values).item() == pytest.approx((colour + binary).item(), rel=1e-5)


def test_head_accuracy_counts_the_known_rows_only():
    """Rows without a class neither help nor harm a head's accuracy."""
    pixels, _ = toy(per_class=5)
    model = worn_classifier("vgg11", "symmetric")
    with torch.no_grad():
        answers = model(to_image(pixels))["colour"].argmax(1)
    half = torch.where(torch.arange(15) < 5, answers, torch.full((15,), -100))
    half[0] = (answers[0] + 1) % 3
    targets = Targets(classes={"colour": ("a", "b", "c")}, values={"colour": half})
    assert head_accuracy(model, pixels, targets)["colour"] == pytest.approx(4 / 5)


def test_tap_means_do_not_depend_on_the_batch():
    """Mean absolute activations are over all images, uneven last batch included."""
    pixels, _ = toy(per_class=5)
    teacher = worn_classifier("vgg11", "symmetric").fold()
    means = tap_means(teacher, pixels, batch=4)
    with torch.no_grad():
        taps = teacher(to_image(pixels))
    assert list(means) == list(taps)
    assert means == pytest.approx({n: t.abs().mean().item() for n, t in taps.items()}, rel=1e-4)


@pytest.mark.parametrize("warmup", [0.1, 0.2])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 9, 10, 11, 50])
def test_one_cycle_of_any_length(steps, warmup):
    """However few the steps, each has a rate between 0 and the peak, and the last is small."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = one_cycle(optimizer, 2e-3, steps=steps, warmup=warmup)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            schedule.step()
    assert all(0 < rate <= 2e-3 for rate in rates)
    assert rates[-1] < 1e-6

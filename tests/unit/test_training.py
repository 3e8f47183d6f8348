"""The training loop: what it learns, where it goes on, and what stops it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import pytest
import tiny_data
import torch

from sdn.captions import new_encoder, save_encoder
from sdn.checkpoint import Checkpoints
from sdn.config import (
    CaptionConfig,
    LossWeights,
    RunConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
)
from sdn.data.files import LocalFolder
from sdn.data.records import Batch
from sdn.sampling import ENCODER
from sdn.stage_run import (
    TAP_MEANS,
    TEACHER,
    Embedder,
    StageInputs,
    images_of,
    new_student,
    run_stage,
    stage_plan,
    steps_of,
    write_model,
)
from sdn.teacher import empty_teacher, open_teacher, save_teacher
from sdn.trainer import Trainer, average_decay, rate_at
from sdn.training import choose_precision, train

STAGE_NAMES = ("stage_one", "stage_two")


def config_of(**changes):
    """A run on 32 px images with networks of a few channels."""
    values = {"global_batch": 4, "rate": 1e-3, "precision": "float32", "checkpoint_images": 8}
    stage = StageConfig(**(values | changes))
    return RunConfig(
        name="tiny",
        data=tiny_data.CONFIG,
        teacher=TeacherConfig(arch="vgg11", width=0.05, convention="symmetric"),
        captions=CaptionConfig(dim=8, width=8, max_chars=40),
        student=StudentConfig(init="he"),
        stage_one=stage,
        stage_two=stage,
        lanes=4,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folders with 10 training images in two shards, a teacher and a caption encoder."""
    folder = tmp_path_factory.mktemp("inputs")
    return make_inputs(folder)


def make_inputs(folder):
    config = config_of()
    found = StageInputs(
        data=folder / "data", teacher=folder / "teacher", captions=folder / "captions"
    )
    for path in (found.data, found.teacher, found.captions):
        path.mkdir(parents=True)
    tiny_data.write(found.data, tiny_data.records(train=10, test=2))
    torch.manual_seed(0)
    teacher = empty_teacher(config.teacher)
    for conv in teacher.convs.values():
        torch.nn.init.normal_(conv.weight, 0, (2 / conv.weight[0].numel()) ** 0.5)
    save_teacher(teacher, found.teacher / TEACHER)
    means = dict.fromkeys(teacher.names, 0.5)
    (found.teacher / TAP_MEANS).write_text(json.dumps(means))
    save_encoder(new_encoder(config.captions), found.captions / ENCODER)
    return found


def trainer_of(inputs, name="stage_one", steps=10, **changes):
    config = config_of(**changes)
    return Trainer(
        name,
        new_student(config),
        open_teacher(inputs.teacher / TEACHER),
        getattr(config, name),
        steps=steps,
        tap_means=json.loads((inputs.teacher / TAP_MEANS).read_text()),
        precision="float32",
    )


def batch_of(step=0, n=3):
    """A batch of bright, flat pictures, and their embeddings."""
    pixels = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    for row in range(n):
        pixels[row, row % 3] = 230
    return Batch(
        keys=tuple(f"key-{row}" for row in range(n)),
        pixels=pixels,
        captions=tuple(f"caption {row}" for row in range(n)),
        labels=({},) * n,
        epoch=0,
        step=step,
        weight=1.0,
    )


def embed(captions):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(len(captions), 8, generator=generator)


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{n}")
    else:
        assert a == b, where


def assert_same_state(a, b):
    for name in ("step", "images_seen", "model", "average", "optimizer", "precision"):
        assert_same(getattr(a, name), getattr(b, name), name)


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_one_repeated_batch_learns(inputs, name):
    """Both stages bring the loss of a batch that they see again and again down by a third."""
    trainer = trainer_of(
        inputs,
        name,
        steps=100,
        rate=5e-3,
        weights=LossWeights(image=10),
        scale="relative",
        average_share=0.1,
    )
    totals = []
    for step in range(100):
        terms, norm = trainer.advance(batch_of(step), embed(range(3)), 3)
        totals.append(float(sum(terms.values())))
        assert math.isfinite(float(norm))
        assert norm > 0
    assert all(math.isfinite(total) for total in totals)
    assert totals[-1] < 0.67 * totals[0]
    assert trainer.step == 100
    assert trainer.images_seen == 300


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_only_the_student_moves(inputs, name):
    """A step changes every weight of the student that the loss reaches, and none of the teacher."""
    trainer = trainer_of(inputs, name)
    teacher = {k: v.clone() for k, v in trainer.teacher.state_dict().items()}
    student = {k: v.clone() for k, v in trainer.student.state_dict().items()}
    trainer.advance(batch_of(), embed(range(3)), 3)
    assert_same(teacher, dict(trainer.teacher.state_dict()))
    moved = [k for k, v in trainer.student.state_dict().items() if not torch.equal(v, student[k])]
    assert {k for k in student if k.endswith("weight")} <= set(moved)


def test_batch_weight_scales_the_gradient(inputs):
    """A batch of weight one half pulls half as hard; one of weight 0 does not pull."""
    norms = {}
    for weight in (1.0, 0.5, 0.0):
        trainer = trainer_of(inputs)
        batch = Batch(**{n: getattr(batch_of(), n) for n in Batch.__slots__} | {"weight": weight})
        norms[weight] = float(trainer.advance(batch, embed(range(3)), 3)[1])
    assert norms[0.5] == pytest.approx(norms[1.0] / 2, rel=1e-4)
    assert norms[0.0] == 0


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.02), (4, 0.1), (9, 0.2), (10, 0.2), (55, 0.101), (100, 0.002)],
)
def test_one_cycle_rate(step, expected):
    """One cycle: linear up to the peak, then half a cosine down to a hundredth of it."""
    config = StageConfig(schedule="one-cycle", rate=0.2, warmup_share=0.1)
    assert rate_at(step, 100, config) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_one_cycle_rate_stays_in_bounds(steps):
    """Whatever the length, the rate is positive, at most the peak, and falls after it."""
    config = StageConfig(schedule="one-cycle", rate=0.3, warmup_share=0.2)
    rates = [rate_at(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= 0.3 for rate in rates)
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.3)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])


def test_constant_rate():
    """The constant schedule is the configured rate at every step."""
    config = StageConfig(rate=3e-4)
    assert {rate_at(step, 50, config) for step in range(50)} == {3e-4}


def test_optimizer_follows_the_schedule(inputs):
    """The rate that a step uses is the schedule's for that step."""
    trainer = trainer_of(inputs, schedule="one-cycle", warmup_share=0.5)
    for step in range(6):
        trainer.advance(batch_of(step), embed(range(3)), 3)
        expected = rate_at(step, 10, trainer.config)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [expected]


def test_average_decay():
    """The decay grows with the steps up to that of the horizon."""
    config = StageConfig(average_share=0.1)
    assert average_decay(0, 1000, config) == pytest.approx(0.1)
    assert average_decay(8, 1000, config) == pytest.approx(0.5)
    assert average_decay(900, 1000, config) == pytest.approx(1 - 1 / 100)
    decays = [average_decay(step, 1000, config) for step in range(1000)]
    assert decays == sorted(decays)
    assert average_decay(5, 3, config) == 0  # a horizon of one step: the weights themselves


def test_moving_average_is_the_written_recursion(inputs):
    """Each step the average moves to decay * average + (1 - decay) * weights, and goes on."""
    trainer = trainer_of(inputs, steps=40, average_share=0.3)
    expected = {k: v.clone() for k, v in trainer.student.state_dict().items()}
    for step in range(5):
        trainer.advance(batch_of(step), embed(range(3)), 3)
        decay = average_decay(step, 40, trainer.config)
        for key, value in trainer.student.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value
    for key, value in trainer.weights().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)
        assert value is trainer.average[key]


def test_without_average_the_weights_go_on(inputs):
    """A stage that keeps no average goes on with the student's own weights."""
    trainer = trainer_of(inputs)
    trainer.advance(batch_of(), embed(range(3)), 3)
    assert trainer.average is None
    assert trainer.checkpoint().average is None
    assert_same(trainer.weights(), dict(trainer.student.state_dict()))


def test_checkpoint_is_independent_of_later_steps(inputs):
    """A checkpoint held in memory does not change when the trainer goes on."""
    trainer = trainer_of(inputs, average_share=0.2)
    trainer.advance(batch_of(), embed(range(3)), 3)
    held, twin = trainer.checkpoint(), trainer.checkpoint()
    trainer.advance(batch_of(1), embed(range(3)), 3)
    assert_same_state(held, twin)
    assert held.step == 1


@pytest.mark.parametrize("name", STAGE_NAMES)
@pytest.mark.parametrize("stop", [2, 4, 6])
def test_resumed_stage_is_bit_for_bit_the_uninterrupted_one(inputs, tmp_path, name, stop):
    """Stopped in any epoch and gone on from a file, a stage ends with the very same state."""
    config = config_of(
        epochs=3, average_share=0.3, schedule="one-cycle", checkpoint_images=8, seed=3
    )
    whole_states, whole_reports, keys = {}, [], []

    def keep(trainer):
        whole_states[trainer.step] = trainer.checkpoint()

    whole = run_stage(
        name,
        config,
        inputs,
        save=keep,
        report=whole_reports.append,
        consumed=lambda batch: keys.append((batch.step, batch.epoch, batch.keys, batch.captions)),
    )
    assert whole.step == 9  # 10 images in batches of 4, three times
    assert sorted(whole_states) == [2, 4, 6, 8, 9]

    def stopping(trainer):
        if trainer.step == stop:
            Checkpoints(LocalFolder(tmp_path)).save(trainer.checkpoint())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(name, config, inputs, save=stopping, report=lambda report: None)
    found = Checkpoints(LocalFolder(tmp_path)).newest()
    assert found.step == stop
    assert_same_state(found, whole_states[stop])

    states, reports, again = {}, [], []

    def keep_again(trainer):
        states[trainer.step] = trainer.checkpoint()

    torch.manual_seed(99)  # nothing may depend on the global generator
    resumed = run_stage(
        name,
        config,
        inputs,
        save=keep_again,
        report=reports.append,
        resume=found,
        consumed=lambda batch: again.append((batch.step, batch.epoch, batch.keys, batch.captions)),
    )
    assert again == keys[stop:]
    assert {epoch for _, epoch, _, _ in again} >= {2}
    assert sorted(states) == [step for step in (2, 4, 6, 8, 9) if step > stop]
    for step, state in states.items():
        assert_same_state(state, whole_states[step])
    assert_same(resumed.weights(), whole.weights())
    assert resumed.images_seen == whole.images_seen == 30
    assert reports[-1].losses == whole_reports[-1].losses
    assert reports[-1].gradient_norm == whole_reports[-1].gradient_norm


def test_consumed_keys_cover_each_sample_once_an_epoch(inputs):
    """Every epoch reads each training sample once, in another order, and images are counted."""
    seen, orders, reports = {}, {}, []

    def note(batch):
        seen.setdefault(batch.epoch, Counter()).update(batch.keys)
        orders.setdefault(batch.epoch, []).extend(batch.keys)

    run_stage(
        "stage_one",
        config_of(epochs=3),
        inputs,
        save=lambda trainer: None,
        report=reports.append,
        consumed=note,
    )
    everything = Counter(f"item-{n}" for n in range(10))
    assert seen == {0: everything, 1: everything, 2: everything}
    assert len({tuple(order) for order in orders.values()}) > 1
    (last,) = reports
    assert (last.step, last.steps, last.images_seen) == (9, 9, 30)
    assert last.losses["loss/total"] == pytest.approx(
        sum(v for k, v in last.losses.items() if k != "loss/total")
    )
    assert 0 <= last.waiting_share <= 1
    assert last.images_per_s > 0


def test_stage_of_no_epochs_changes_nothing(inputs):
    """A stage of length 0 runs no step, and saves and returns the start."""
    config = config_of(epochs=0)
    saves = []
    trainer = run_stage("stage_one", config, inputs, save=saves.append, report=lambda report: None)
    assert trainer.step == 0
    assert saves == [trainer]
    assert_same(trainer.weights(), dict(new_student(config).state_dict()))


def test_what_no_term_reaches_keeps_its_weights(inputs):
    """Without the image term stage one leaves the last convolution alone, and trains all others."""
    config = config_of(epochs=1, weights=LossWeights(image=0))
    start = new_student(config).state_dict()
    trainer = run_stage("stage_one", config, inputs, save=lambda t: None, report=lambda r: None)
    end = trainer.student.state_dict()
    kept = {name for name in start if torch.equal(start[name], end[name])}
    assert kept == {"convs.image.weight", "convs.image.bias"}


def test_resuming_a_finished_stage_runs_nothing(inputs):
    """A checkpoint of the last step has nothing left to do."""
    config = config_of(epochs=1)
    finished = run_stage("stage_one", config, inputs, save=lambda t: None, report=lambda r: None)
    saves = []
    again = run_stage(
        "stage_one",
        config,
        inputs,
        save=saves.append,
        report=lambda r: None,
        resume=finished.checkpoint(),
    )
    assert saves == []
    assert_same_state(again.checkpoint(), finished.checkpoint())


def test_steps_and_images(inputs):
    """Lengths in epochs become steps, and the last batch of an epoch has what is left."""
    plan = stage_plan(config_of(), config_of().stage_one, inputs.data)
    assert plan.steps_per_epoch == 3
    lengths = {0: 0, 0.01: 1, 1: 3, 1.5: 4, 2: 6}
    for epochs, steps in lengths.items():
        assert steps_of(StageConfig(epochs=epochs), plan) == steps
    assert [images_of(plan, step) for step in range(6)] == [4, 4, 2, 4, 4, 2]


def loop(trainer, count, **changes):
    """Run `train` on `count` made batches and return what it saved and reported."""
    saved, reports = [], []
    arguments = {
        "save_every": 2,
        "save": lambda: saved.append(trainer.step),
        "report": reports.append,
        "report_every": 3,
    }
    batches = (batch_of(step) for step in range(trainer.step, count))
    train(
        trainer,
        batches,
        lambda batch: trainer.advance(batch, embed(batch.captions), 3),
        **(arguments | changes),
    )
    return saved, reports


def test_saves_and_reports_come_when_due(inputs):
    """Checkpoints and reports come at their steps and at the last."""
    saved, reports = loop(trainer_of(inputs, steps=7), 7)
    assert saved == [2, 4, 6, 7]
    assert [report.step for report in reports] == [3, 6, 7]
    assert reports[0].rate == 1e-3


@pytest.mark.parametrize(("value", "at"), [(math.nan, 4), (math.inf, 4), (math.nan, 3)])
def test_loss_that_is_not_finite_stops_the_stage(inputs, monkeypatch, value, at):
    """The error names step and term, and nothing is saved or reported from that step on."""
    trainer = trainer_of(inputs, steps=8)
    losses, saved, reports = Trainer.losses, [], []

    def broken(self, text, image):
        terms = losses(self, text, image)
        if self.step >= at - 1:  # the step that makes `at` done
            terms["conv2_1"] = terms["conv2_1"] * value
        return terms

    monkeypatch.setattr(Trainer, "losses", broken)
    with pytest.raises(FloatingPointError, match=rf"not finite at step {at} in .*conv2_1"):
        loop(
            trainer,
            8,
            save=lambda: saved.append(trainer.step),
            report=reports.append,
            report_every=100,
        )
    assert saved == [2]
    assert reports == []


def test_loss_that_is_not_finite_is_never_reported(inputs, monkeypatch):
    """At a step that is reported but not saved, the error comes in place of the report."""
    reports = []
    monkeypatch.setattr(
        Trainer,
        "losses",
        lambda self, text, image: {"image": self.student(text)["image"].sum() * math.nan},
    )
    with pytest.raises(FloatingPointError, match="at step 1 in image"):
        loop(trainer_of(inputs, steps=8), 8, save_every=100, report=reports.append)
    assert reports == []


def test_a_bad_stage_leaves_its_last_good_checkpoint(inputs, tmp_path, monkeypatch):
    """Through a whole stage: the newest checkpoint after the error is finite throughout."""
    losses = Trainer.losses

    def broken(self, text, image):
        terms = losses(self, text, image)
        return {k: v * math.nan for k, v in terms.items()} if self.step == 4 else terms

    monkeypatch.setattr(Trainer, "losses", broken)
    with pytest.raises(FloatingPointError):
        run_stage(
            "stage_one",
            config_of(epochs=3),
            inputs,
            save=lambda t: Checkpoints(LocalFolder(tmp_path)).save(t.checkpoint()),
            report=lambda report: None,
        )
    found = Checkpoints(LocalFolder(tmp_path)).newest()
    assert found.step == 4
    assert all(value.isfinite().all() for value in found.model.values())


def test_weights_gone_bad_in_the_step_are_not_saved(inputs, monkeypatch):
    """A finite loss whose gradient is not finite spoils the weights; they are not saved."""
    trainer = trainer_of(inputs, steps=4)
    saved = []

    class Spoiling(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.clone()

        @staticmethod
        def backward(_, gradient):
            return gradient * math.nan

    losses = Trainer.losses

    def spoiled(self, text, image):
        terms = losses(self, text, image)
        return {k: Spoiling.apply(v) for k, v in terms.items()} if self.step == 1 else terms

    monkeypatch.setattr(Trainer, "losses", spoiled)
    with pytest.raises(FloatingPointError, match="step 2 in its gradient"):
        loop(trainer, 4, save=lambda: saved.append(trainer.step))
    assert saved == []


def test_embedder_encodes_each_caption_once():
    """A caption is encoded once, rows come in the order asked for, and memory is bounded."""
    asked = []

    def encode(captions):
        asked.append(list(captions))
        return torch.tensor([[float(len(caption))] for caption in captions])

    embedder = Embedder(encode, most=3)
    assert embedder(("bbb", "a", "bbb")).tolist() == [[3], [1], [3]]
    assert embedder(("a", "cc")).tolist() == [[1], [2]]
    assert asked == [["a", "bbb"], ["cc"]]
    assert embedder(("dddd", "a")).tolist() == [[4], [1]]
    assert asked[-1] == ["a", "dddd"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "avx2": True}, "float32"),
        ({"architecture": "arm64"}, "float32"),
    ],
)
def test_choose_precision(found, expected, monkeypatch):
    """What is wanted is taken; auto depends on what the processor has, and on nothing else."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    cpu = torch.device("cpu")
    assert choose_precision("bf16", cpu) == "bf16"
    assert choose_precision("float32", cpu) == "float32"
    assert choose_precision("auto", cpu) == expected


def test_resumed_stage_keeps_its_precision(inputs):
    """A stage begun in bf16 goes on in bf16, whatever this machine would choose."""
    config = config_of(epochs=1, precision="bf16")
    held = []
    run_stage(
        "stage_one",
        config,
        inputs,
        save=lambda t: held.append(t.checkpoint()),
        report=lambda r: None,
    )
    assert held[0].precision == "bf16"
    resumed = run_stage(
        "stage_one",
        config_of(epochs=1, precision="float32"),
        inputs,
        save=lambda t: None,
        report=lambda r: None,
        resume=held[0],
    )
    assert resumed.precision == "bf16"


def test_stage_starts_from_a_model(inputs, tmp_path):
    """Given a model folder, a stage goes on from that student's weights."""
    config = config_of(epochs=0)
    weights = {k: v + 0.25 for k, v in new_student(config).state_dict().items()}
    write_model(tmp_path, config, inputs.captions, weights)
    trainer = run_stage(
        "stage_two",
        config,
        dataclasses.replace(inputs, start=tmp_path),
        save=lambda t: None,
        report=lambda r: None,
    )
    assert_same(trainer.weights(), weights)

"""A training that is interrupted, stopped, fails, or finds its place full."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import training_place

import sdn.diverging
from sdn.checkpoint import Checkpoints
from sdn.data.files import LocalFolder
from sdn.ledger import attempts_of, audit
from sdn.recording import SHEETS
from sdn.running import KnownFailureError, run_recorded
from sdn.stage_run import keys_of
from sdn.trainer import Trainer
from sdn.training import LossNotFiniteError

PER_EPOCH = 15


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("running")
    training_place.write_store(folder)
    return folder


def order_of(store, name, **stage):
    return training_place.order_of(store, name, **({"epochs": 4, "checkpoint_images": 60} | stage))


def stop_after(steps):
    """`alive` and `stopping` of a rank that is asked to stop after so many steps."""
    done = []
    return {"alive": done.append, "stopping": lambda: bool(done) and done[-1] >= steps}


def test_a_stopped_training_loses_nothing_and_goes_on(store):
    """Asked to stop it saves and says so; gone on with, it ends as the calm one, bit for bit."""
    calm, _ = run_recorded(order_of(store, "calm").opener(), order_of(store, "calm").place())
    order = order_of(store, "stopped")
    for steps in (7, 33):
        trainee, ended = run_recorded(order.opener(), order.place(), **stop_after(steps))
        assert (trainee.step, ended) == (steps, False)
        assert Checkpoints(order.place()).newest().step == steps
    trainee, ended = run_recorded(order.opener(), order.place())
    assert (trainee.step, ended) == (60, True)
    for name, value in calm.checkpoint().model.items():
        assert torch.equal(value, trainee.checkpoint().model[name]), name
    found = audit(order.place(), keys_of(store / "data", "train"), steps_per_epoch=15, steps=60)
    assert (found.problems, found.rolled_back) == ((), 0)
    assert [attempt.start for attempt in found.attempts] == [0, 7, 33]


def test_what_is_saved_has_everything(store):
    """All state is in the checkpoint, with config and versions; a sheet is drawn beside it."""
    order = order_of(store, "all", epochs=1)
    run_recorded(order.opener(), order.place(), sheet=lambda checkpoint: b"PNG")
    last = Checkpoints(order.place()).newest()
    assert (last.step, last.steps, last.images_seen) == (15, 15, 90)
    assert last.config["checkpoint_images"] == 60
    assert {"torch", "python", "method"} <= last.versions.keys()
    assert last.average.keys() == last.model.keys()
    assert last.generator is not None
    assert order.place().read(f"{SHEETS}/step-000000015.png") == b"PNG"


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_a_sheet_takes_one_thread(store):
    """What a sheet computes beside a training takes one thread; the training keeps its own."""
    found = []

    def sheet(_):
        found.append(torch.get_num_threads())
        return b"PNG"

    order = order_of(store, "threads", epochs=1)
    run_recorded(order.opener(), order.place(), sheet=sheet)
    assert found == [1, 1]
    assert torch.get_num_threads() == 2


def test_fp16_keeps_its_scaler(store):
    """In fp16 the scale of the losses is part of the state, and is gone on with."""
    order = order_of(store, "fp16", precision="fp16", epochs=2)
    run_recorded(order.opener(), order.place(), **stop_after(9))
    saved = Checkpoints(order.place()).newest()
    assert saved.precision == "fp16"
    assert saved.scaler["_growth_tracker"] > 0
    trainee, ended = run_recorded(order.opener(), order.place())
    assert ended
    assert trainee.checkpoint().scaler["_growth_tracker"] > saved.scaler["_growth_tracker"]


def test_a_loss_that_is_not_finite_is_remembered(store, monkeypatch):
    """The error names step and term; the checkpoint before stays; the same is not tried again."""
    order = order_of(store, "nan")
    losses = Trainer.losses

    def broken(self, text, image):
        terms = losses(self, text, image)
        return terms | {"pool2": terms["pool2"] * torch.nan} if self.step == 23 else terms

    monkeypatch.setattr(Trainer, "losses", broken)
    with pytest.raises(LossNotFiniteError, match=r"step 24 in .*pool2"):
        run_recorded(order.opener(), order.place())
    monkeypatch.undo()
    assert Checkpoints(order.place()).newest().step == 20
    attempts = len(attempts_of(order.place()))
    with pytest.raises(KnownFailureError, match=r"stage_one\.rate=.*delete .*failed\.json"):
        run_recorded(order.opener(), order.place())
    assert len(attempts_of(order.place())) == attempts
    order.place().remove("failed.json")
    assert run_recorded(order.opener(), order.place())[1]


def test_a_training_that_diverges_is_told_of(store, monkeypatch):
    """While the loss is a number it goes on to its end, and a person hears of it once."""
    move = Trainer._move

    def diverging(self, images):
        return move(self, images) * (1e6 if self.step > 20 else 1)

    monkeypatch.setattr(Trainer, "_move", diverging)
    monkeypatch.setattr(sdn.diverging, "_FIRST", 1)
    monkeypatch.setattr(sdn.diverging, "_LASTING", 1)
    order, said = order_of(store, "diverging"), []
    _, ended = run_recorded(order.opener(), order.place(), say=said.append)
    (text,) = said
    assert text.startswith("at step 40 the gradient's norm is ")
    assert ended


class Full(LocalFolder):
    """A folder on a disk that is full from some point on."""

    left = 10**9

    def _spend(self):
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")

    def write(self, name, data):
        self._spend()
        super().write(name, data)

    def writing(self, name):
        self._spend()
        return super().writing(name)


@pytest.mark.parametrize("left", [0, 1, 2, 3, 5, 8, 13])
def test_a_full_disk_stops_and_loses_nothing(store, left):
    """Wherever it gets full the training stops with that reason; with room it goes on and ends."""
    order = order_of(store, f"full-{left}")
    place = Full(order.place().path)
    place.left = left
    with pytest.raises(OSError, match="No space left"):
        run_recorded(order.opener(), place)
    newest = Checkpoints(order.place()).newest()
    trainee, ended = run_recorded(order.opener(), order.place())
    assert ended
    start = attempts_of(order.place())[-1].start
    assert start == (0 if newest is None else newest.step)
    found = audit(order.place(), keys_of(store / "data", "train"), steps_per_epoch=15, steps=60)
    assert found.problems == ()
    assert trainee.step == 60


def test_a_damaged_newest_checkpoint_costs_an_interval(store):
    """The one before is taken, and what was seen since is rolled back in the ledger."""
    order, said = order_of(store, "damaged"), []
    run_recorded(order.opener(), order.place(), **stop_after(30))
    (order.place().path / "checkpoints" / "step-000000030" / "state.pt").write_bytes(b"short")
    _, ended = run_recorded(order.opener(), order.place(), say=said.append)
    assert ended
    assert "an older one is taken" in said[0]
    found = audit(order.place(), keys_of(store / "data", "train"), steps_per_epoch=15, steps=60)
    assert (found.problems, found.rolled_back) == ((), 10)
    assert found.attempts[1].start == 20


def test_the_order_crosses_to_a_job_as_json(store):
    """What a worker is told survives JSON, as it travels to a Ray Job."""
    order = order_of(store, "json")
    values = json.loads(json.dumps(dataclasses.asdict(order)))
    again = type(order)(**{**values, "workers": tuple(values["workers"])})
    assert again == order
    assert again.run_config() == order.run_config()

"""Checkpoints survive what can go wrong with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sdn import checkpoint
from sdn.checkpoint import Checkpoint, Checkpoints, DamagedCheckpointError
from sdn.data.files import LocalFolder


def sample(step=7, average=True):
    generator = torch.Generator().manual_seed(step)
    weights = {"conv.weight": torch.randn(4, 3, generator=generator), "conv.bias": torch.zeros(4)}
    return Checkpoint(
        step=step,
        images_seen=step * 8,
        steps=100,
        model=weights,
        average={k: v + 1 for k, v in weights.items()} if average else None,
        optimizer={
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, 3)}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}],
        },
        config={"epochs": 1.0, "weights": {"taps": {}}},
        precision="float32",
    )


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


@pytest.mark.parametrize("average", [True, False])
def test_round_trip_keeps_every_field(tmp_path, average):
    """A loaded checkpoint equals the saved one, with or without a moving average."""
    saved = sample(average=average)
    save(saved, tmp_path / "step-7")
    loaded = load(tmp_path / "step-7")
    for field in dataclasses.fields(Checkpoint):
        assert_same(getattr(saved, field.name), getattr(loaded, field.name))


def test_save_leaves_only_state_and_mark(tmp_path):
    """No temporary file is left beside a finished checkpoint, and the mark names its step."""
    save(sample(), tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {checkpoint.STATE, checkpoint.MARK}
    assert json.loads((tmp_path / "a" / checkpoint.MARK).read_text())["step"] == 7


def test_truncated_state_is_refused(tmp_path):
    """A state that lost its end is damaged, and the text names the file."""
    save(sample(), tmp_path)
    data = (tmp_path / checkpoint.STATE).read_bytes()
    (tmp_path / checkpoint.STATE).write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedCheckpointError, match=checkpoint.STATE):
        load(tmp_path)


@pytest.mark.parametrize("place", [0, 0.5, 0.99])
def test_flipped_byte_is_refused(tmp_path, place):
    """One changed byte of the state, wherever it is, is noticed."""
    save(sample(), tmp_path)
    data = bytearray((tmp_path / checkpoint.STATE).read_bytes())
    data[int(place * len(data))] ^= 0x10
    (tmp_path / checkpoint.STATE).write_bytes(bytes(data))
    with pytest.raises(DamagedCheckpointError, match="damaged"):
        load(tmp_path)


@pytest.mark.parametrize("name", [checkpoint.MARK, checkpoint.STATE])
def test_missing_file_is_refused(tmp_path, name):
    """Without its mark, or without its state, a folder holds no complete checkpoint."""
    save(sample(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DamagedCheckpointError, match="no complete checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"format": 1, "st'])
def test_cut_off_mark_is_refused(tmp_path, text):
    """A mark that is no whole JSON marks nothing."""
    save(sample(), tmp_path)
    (tmp_path / checkpoint.MARK).write_text(text)
    with pytest.raises(DamagedCheckpointError, match="no complete checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["null", "[]", "7", '{"format": 1}', '{"format": 1, "bytes": 3}'])
def test_mark_of_another_shape_is_refused(tmp_path, text):
    """JSON that is not a mark is a damaged checkpoint, not another error."""
    save(sample(), tmp_path)
    (tmp_path / checkpoint.MARK).write_text(text)
    with pytest.raises(DamagedCheckpointError, match="is no mark"):
        load(tmp_path)


def test_other_format_is_refused(tmp_path):
    """A checkpoint of another layout names both versions."""
    save(sample(), tmp_path)
    mark = json.loads((tmp_path / checkpoint.MARK).read_text())
    (tmp_path / checkpoint.MARK).write_text(json.dumps(mark | {"format": 99}))
    with pytest.raises(DamagedCheckpointError, match="format 99, this version reads 1"):
        load(tmp_path)


def test_newest_takes_the_highest_step(tmp_path):
    """Steps count as numbers: 10 comes after 9, whatever the folders are called."""
    for step in (9, 10, 2):
        save(sample(step), tmp_path / f"step-{step}")
    assert newest(tmp_path) == tmp_path / "step-10"


def test_newest_skips_the_damaged(tmp_path):
    """Damaged checkpoints of higher steps leave the best whole one in force."""
    for step in (1, 2, 3, 4):
        save(sample(step), tmp_path / f"step-{step}")
    (tmp_path / "step-4" / checkpoint.MARK).unlink()
    (tmp_path / "step-3" / checkpoint.STATE).write_bytes(b"short")
    assert newest(tmp_path) == tmp_path / "step-2"


def test_newest_of_nothing(tmp_path):
    """No folder, an empty folder and one with only damaged checkpoints hold no newest."""
    assert newest(tmp_path / "absent") is None
    assert newest(tmp_path) is None
    (tmp_path / "step-1").mkdir()
    assert newest(tmp_path) is None


@pytest.mark.parametrize("failing", [checkpoint.STATE, checkpoint.MARK])
def test_write_that_fails_half_way_leaves_the_older_newest(tmp_path, monkeypatch, failing):
    """A full disk while state or mark is put in place leaves the older checkpoint newest."""
    save(sample(1), tmp_path / "step-1")
    replace = Path.replace

    def full(self, target):
        if Path(target).name == failing:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            save(sample(2), tmp_path / "step-2")
    assert newest(tmp_path) == tmp_path / "step-1"
    assert load(tmp_path / "step-1").step == 1
    save(sample(2), tmp_path / "step-2")
    assert newest(tmp_path) == tmp_path / "step-2"

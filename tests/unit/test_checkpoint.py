"""Checkpoints survive what can go wrong with them."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
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


def at(folder, **options):
    return Checkpoints(LocalFolder(folder), **options)


def place(folder, step=7):
    """Folder of a checkpoint on disk."""
    return folder / checkpoint.FOLDER / f"step-{step:09d}"


@pytest.mark.parametrize("average", [True, False])
def test_round_trip_keeps_every_field(tmp_path, average):
    """A loaded checkpoint equals the saved one, with or without a moving average."""
    saved = sample(average=average)
    at(tmp_path).save(saved)
    loaded = at(tmp_path).load(7)
    for field in dataclasses.fields(Checkpoint):
        assert_same(getattr(saved, field.name), getattr(loaded, field.name))


def test_save_leaves_only_state_and_mark(tmp_path):
    """No temporary file is left beside a finished checkpoint, and the mark names its step."""
    at(tmp_path).save(sample(), loss=0.5)
    assert {p.name for p in place(tmp_path).iterdir()} == {checkpoint.STATE, checkpoint.MARK}
    mark = json.loads((place(tmp_path) / checkpoint.MARK).read_text())
    assert (mark["step"], mark["loss"]) == (7, 0.5)


def test_truncated_state_is_refused(tmp_path):
    """A state that lost its end is damaged, and the text names the file."""
    at(tmp_path).save(sample())
    path = place(tmp_path) / checkpoint.STATE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedCheckpointError, match=checkpoint.STATE):
        at(tmp_path).load(7)


@pytest.mark.parametrize("where", [0, 0.5, 0.99])
def test_flipped_byte_is_refused(tmp_path, where):
    """One changed byte of the state, wherever it is, is noticed."""
    at(tmp_path).save(sample())
    path = place(tmp_path) / checkpoint.STATE
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 0x10
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedCheckpointError, match="damaged"):
        at(tmp_path).load(7)


@pytest.mark.parametrize("name", [checkpoint.MARK, checkpoint.STATE])
def test_missing_file_is_refused(tmp_path, name):
    """Without its mark, or without its state, a folder holds no complete checkpoint."""
    at(tmp_path).save(sample())
    (place(tmp_path) / name).unlink()
    with pytest.raises(DamagedCheckpointError, match="no complete checkpoint"):
        at(tmp_path).load(7)


@pytest.mark.parametrize("text", ["", "{", '{"format": 1, "st'])
def test_cut_off_mark_is_refused(tmp_path, text):
    """A mark that is no whole JSON marks nothing."""
    at(tmp_path).save(sample())
    (place(tmp_path) / checkpoint.MARK).write_text(text)
    with pytest.raises(DamagedCheckpointError, match="no complete checkpoint"):
        at(tmp_path).load(7)


@pytest.mark.parametrize("text", ["null", "[]", "7", '{"format": 2}', '{"format": 2, "bytes": 3}'])
def test_mark_of_another_shape_is_refused(tmp_path, text):
    """JSON that is not a mark is a damaged checkpoint, not another error."""
    at(tmp_path).save(sample())
    (place(tmp_path) / checkpoint.MARK).write_text(text)
    with pytest.raises(DamagedCheckpointError, match="is no mark"):
        at(tmp_path).load(7)


def test_other_format_is_refused(tmp_path):
    """A checkpoint of another layout names both versions."""
    at(tmp_path).save(sample())
    path = place(tmp_path) / checkpoint.MARK
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(DamagedCheckpointError, match="format 99, this version reads 2"):
        at(tmp_path).load(7)


def test_newest_takes_the_highest_step(tmp_path):
    """The newest is that of the highest step, in whatever order they were written."""
    for step in (9, 10, 2):
        at(tmp_path, keep=9).save(sample(step))
    assert at(tmp_path).newest().step == 10


def test_newest_skips_the_damaged_and_says_so(tmp_path):
    """Damaged checkpoints of higher steps leave the best whole one in force."""
    said = []
    for step in (1, 2, 3, 4):
        at(tmp_path, keep=9).save(sample(step))
    (place(tmp_path, 4) / checkpoint.MARK).unlink()
    (place(tmp_path, 3) / checkpoint.STATE).write_bytes(b"short")
    assert at(tmp_path, say=said.append).newest().step == 2
    assert len(said) == 1
    assert "step-000000003" in said[0]
    assert "an older one is taken" in said[0]


def test_newest_of_nothing(tmp_path):
    """No folder, an empty folder and one with only damaged checkpoints hold no newest."""
    assert at(tmp_path / "absent").newest() is None
    assert at(tmp_path).newest() is None
    place(tmp_path, 1).mkdir(parents=True)
    assert at(tmp_path).newest() is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    """Of ten, the newest three stay and the one of the lowest loss; all others go, whole."""
    kept = at(tmp_path, keep=3)
    losses = [9, 5, 2, 3, 4, 5, 6, 7, 8, 9]
    for step, loss in enumerate(losses, start=1):
        kept.save(sample(step), loss)
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == [
        f"step-{step:09d}" for step in (3, 8, 9, 10)
    ]


def test_a_damaged_checkpoint_is_written_anew(tmp_path):
    """What was damaged and is reached again takes the damaged one's place."""
    at(tmp_path).save(sample(7))
    (place(tmp_path) / checkpoint.STATE).write_bytes(b"short")
    at(tmp_path).save(sample(7))
    assert at(tmp_path).newest().step == 7


class Dying(LocalFolder):
    """A folder whose process dies after so many bytes, renamings and removals."""

    def __init__(self, path, units):
        super().__init__(path)
        self.units = units

    def spend(self, count=1):
        self.units -= count
        if self.units < 0:
            raise KeyboardInterrupt

    @contextmanager
    def writing(self, name):
        # As `LocalFolder` writes, but what has been written stays when it dies, as by SIGKILL.
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        dying = self

        class Counted:
            def __init__(self, file):
                self.file = file

            def write(self, data):
                for start in range(0, len(data), 64):
                    dying.spend()
                    self.file.write(data[start : start + 64])
                return len(data)

            def flush(self):
                self.file.flush()

        with temporary.open("wb") as file:
            yield Counted(file)
        self.spend()
        temporary.replace(path)

    def remove(self, name):
        self.spend()
        super().remove(name)


def test_a_kill_at_any_point_of_a_write_leaves_a_newest_that_loads(tmp_path):
    """At each of more points than 50 in writing and tidying up the third, one loads: 2 or 3."""
    generous = Dying(tmp_path / "whole", 10**9)
    checkpoints = Checkpoints(generous, keep=1)
    checkpoints.save(sample(1), 3.0)
    checkpoints.save(sample(2), 2.0)
    before = generous.units
    checkpoints.save(sample(3), 1.0)
    points = before - generous.units
    assert points > 50
    found = []
    for point in range(points):
        folder = tmp_path / str(point)
        for step in (1, 2):
            at(folder, keep=1).save(sample(step), 4.0 - step)
        with pytest.raises(KeyboardInterrupt):
            Checkpoints(Dying(folder, point), keep=1).save(sample(3), 1.0)
        newest = at(folder).newest()
        assert_same(newest.model, sample(newest.step).model)
        found.append(newest.step)
        at(folder, keep=1).save(sample(3), 1.0)  # the next attempt gets there, whatever is left
        assert at(folder).newest().step == 3
    assert found == sorted(found)
    assert set(found) == {2, 3}


@pytest.mark.parametrize("failing", [checkpoint.STATE, checkpoint.MARK])
def test_full_disk_leaves_the_older_newest(tmp_path, monkeypatch, failing):
    """A full disk while state or mark is put in place leaves the older checkpoint newest."""
    at(tmp_path).save(sample(1))
    replace = Path.replace

    def full(self, target):
        if Path(target).name == failing:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            at(tmp_path).save(sample(2))
    assert at(tmp_path).newest().step == 1
    at(tmp_path).save(sample(2))
    assert at(tmp_path).newest().step == 2

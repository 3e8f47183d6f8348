"""What the ledger of a training proves."""

import pytest

from sdn.data.files import LocalFolder
from sdn.journal import Journal
from sdn.ledger import attempts_of, audit, ledger_prefix, note_attempt

KEYS = [f"item-{n}" for n in range(6)]
BATCH = 2
PER_EPOCH = 3


def batch(step):
    """The keys of a step: each epoch goes through all, the odd ones backwards."""
    epoch, along = divmod(step, PER_EPOCH)
    order = KEYS if epoch % 2 == 0 else KEYS[::-1]
    return order[along * BATCH : (along + 1) * BATCH]


def attempt(folder, start, end, world=1, keys=batch):
    """One attempt that did steps start .. end - 1."""
    files = LocalFolder(folder)
    number = note_attempt(files, start=start, world=world, about={})
    for rank in range(world):
        with Journal(files, ledger_prefix(number, rank), every_s=float("inf")) as journal:
            for step in range(start, end):
                journal.add(step, {"epoch": step // PER_EPOCH, "keys": keys(step)[rank::world]})


def audited(folder, steps):
    return audit(LocalFolder(folder), KEYS, steps_per_epoch=PER_EPOCH, steps=steps)


def test_a_calm_training_adds_up(tmp_path):
    """Every sample once an epoch, on one rank and on two."""
    for world in (1, 2):
        attempt(tmp_path / str(world), 0, 9, world)
        found = audited(tmp_path / str(world), 9)
        assert (found.lost, found.twice, found.problems) == (0, 0, ())
        assert (found.samples, found.epochs, found.rolled_back) == (18, 3, 0)
        assert found.attempts[0].world == world


def test_rolled_back_steps_are_marked_and_counted_once(tmp_path):
    """Three attempts, each from a checkpoint before the end of the last; another world size too."""
    attempt(tmp_path, 0, 5)
    attempt(tmp_path, 3, 8, world=2)
    attempt(tmp_path, 6, 9)
    found = audited(tmp_path, 9)
    assert (found.lost, found.twice, found.samples) == (0, 0, 18)
    assert [one.rolled_back for one in found.attempts] == [2, 2, 0]
    assert [one.steps for one in found.attempts] == [5, 5, 3]
    assert found.rolled_back == 4


def test_an_attempt_that_was_overtaken_counts_for_nothing(tmp_path):
    """Where an older checkpoint was taken, all of the attempt between is rolled back."""
    attempt(tmp_path, 0, 6)
    attempt(tmp_path, 4, 6)
    attempt(tmp_path, 2, 9)
    found = audited(tmp_path, 9)
    assert (found.lost, found.twice, found.samples) == (0, 0, 18)
    assert [one.rolled_back for one in found.attempts] == [4, 2, 0]


@pytest.mark.parametrize("wrong", ["doubled", "skipped", "other"])
def test_what_does_not_add_up_is_found(tmp_path, wrong):
    """A batch that came twice, one that never came, and a key that is not of the data set."""

    def keys(step):
        if step == 4:
            return {"doubled": batch(3), "skipped": [], "other": ["item-9", "item-3"]}[wrong]
        return batch(step)

    attempt(tmp_path, 0, 9, keys=keys)
    found = audited(tmp_path, 9)
    assert found.lost == {"doubled": 2, "skipped": 2, "other": 1}[wrong]
    assert found.twice == {"doubled": 2, "skipped": 0, "other": 1}[wrong]
    assert any(text.startswith("epoch 1: ") for text in found.problems)


def test_a_missing_line_is_found(tmp_path):
    """A step of which a rank has no line is named, though all keys were there."""
    files = LocalFolder(tmp_path)
    number = note_attempt(files, start=0, world=2, about={})
    for rank in range(2):
        with Journal(files, ledger_prefix(number, rank), every_s=float("inf")) as journal:
            for step in range(3):
                if (rank, step) != (1, 1):
                    journal.add(step, {"epoch": 0, "keys": batch(step)[rank::2]})
    found = audited(tmp_path, 3)
    assert found.lost == 2  # the line, and the sample in it
    assert "step 1 has the lines of 1 of 2 ranks" in found.problems[0]


def test_an_epoch_that_is_not_whole_is_looked_at_for_doubles(tmp_path):
    """Of the last epoch, cut short, nothing is missing yet, but nothing may come twice."""
    attempt(tmp_path, 0, 5)
    assert audited(tmp_path, 5).lost == 0
    attempt(tmp_path / "b", 0, 5, keys=lambda step: batch(3 if step == 4 else step))
    assert audited(tmp_path / "b", 5).twice == 2


@pytest.mark.parametrize(("left_out", "lost"), [(0, 6), (1, 3), (2, 0), (3, 0)])
def test_what_whole_batches_leave_out_is_not_lost(tmp_path, left_out, lost):
    """A fit takes whole batches: of each epoch as many samples as do not fill one may be missing,
    and no more.
    """
    attempt(tmp_path, 0, 9, keys=lambda step: [] if step % PER_EPOCH == 2 else batch(step))
    found = audit(
        LocalFolder(tmp_path), KEYS, steps_per_epoch=PER_EPOCH, steps=9, left_out=left_out
    )
    assert (found.lost, found.twice, bool(found.problems)) == (lost, 0, lost > 0)


def test_a_damaged_file_is_named(tmp_path):
    """A ledger that cannot be read proves nothing, and says which file it is."""
    attempt(tmp_path, 0, 9)
    (name,) = (tmp_path / "ledger").iterdir()
    whole = name.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"nothing", whole[:30] + b"xxxx" + whole[34:]):
        name.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name.name} is damaged"):
            audited(tmp_path, 9)


def test_attempts_are_numbered(tmp_path):
    """Each attempt has the next number."""
    for start in (0, 3, 3):
        note_attempt(LocalFolder(tmp_path), start=start, world=1, about={})
    assert [(a.number, a.start) for a in attempts_of(LocalFolder(tmp_path))] == [
        (0, 0),
        (1, 3),
        (2, 3),
    ]

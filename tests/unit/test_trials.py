"""The search's ledger: whole records, read again as they were written."""

from __future__ import annotations

import json
import pickle
import threading

import pytest

from pipelines.trials import (
    SPENT,
    TRIALS,
    WORK,
    Trial,
    TrialLedger,
    lower_is_better,
    order_of_merit,
)
from sdn.config import SearchConfig
from sdn.data.files import LocalFolder


def point(images, value=0.5, **more):
    return {
        "images_seen": images,
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "seconds": 2.5,
        "parts": f"work/0000/parts-{images:012d}",
    } | more


def trial(number, state="finished", *points, **more):
    return Trial(
        number=number, values={"conv1": 1.5 + number}, state=state, points=[*points], **more
    )


TRIED = [
    trial(0, "finished", point(100), point(300, 0.25)),
    trial(1, "stopped", point(100, 0.7, values={"conv1": 3.0}), reason="behind the others"),
    trial(2, "failed", reason='ValueError: "quoted"\nand more'),
    trial(3, "running", point(100)),
    trial(10, "running"),
]


def test_a_ledger_opened_again_is_equal(tmp_path):
    """All trials with all they have, and the time used up, are found again by another ledger."""
    ledger = TrialLedger(LocalFolder(tmp_path))
    assert (ledger.all(), ledger.open(), ledger.spent_s) == ([], [], 0)
    for one in reversed(TRIED):
        ledger.write(one)
    ledger.spend(12.5)
    again = TrialLedger(LocalFolder(tmp_path))
    assert again.all() == ledger.all() == TRIED
    assert [one.number for one in again.open()] == [3, 10]
    assert again.spent_s == 12.5
    again.spend(20.5)
    assert TrialLedger(LocalFolder(tmp_path)).spent_s == 20.5


def test_one_file_a_trial(tmp_path):
    """Each trial has a file of its number; writing one leaves the others' bytes alone."""
    ledger = TrialLedger(LocalFolder(tmp_path))
    for one in TRIED[:3]:
        ledger.write(one)
    names = ["0000.json", "0001.json", "0002.json"]
    assert sorted(path.name for path in (tmp_path / TRIALS).iterdir()) == names
    before = (tmp_path / TRIALS / names[0]).read_bytes()
    ledger.write(trial(1, "finished"))
    assert (tmp_path / TRIALS / names[0]).read_bytes() == before
    assert json.loads((tmp_path / TRIALS / names[1]).read_text())["state"] == "finished"


class Interrupted(LocalFolder):
    """A place in which a process dies just before a file would appear."""

    def write(self, name, data):
        hidden = self.path / name.replace("trials/", "trials/.")
        hidden.write_bytes(data[: len(data) // 2])
        raise KeyboardInterrupt


def test_a_record_is_written_whole(tmp_path):
    """Where writing is broken off, the record is as it was before."""
    TrialLedger(LocalFolder(tmp_path)).write(TRIED[3])
    ledger = TrialLedger(Interrupted(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        ledger.write(trial(3, "finished", point(100), point(300)))
    assert TrialLedger(LocalFolder(tmp_path)).all() == [TRIED[3]]


def test_a_rung_heard_again_replaces_what_follows():
    """A point takes the place of the same rung's, and of those after it; earlier ones stay."""
    one = trial(1)
    for images in (100, 300, 900):
        one.add(point(images))
    assert (one.images_seen, one.seconds) == (900, 7.5)
    one.add(point(300, 0.9))
    assert one.points == [point(100), point(300, 0.9)]
    assert (one.images_seen, one.value, one.seconds) == (300, 0.9, 5.0)


def test_a_trial_without_points():
    """Before its first rung a trial has no score and has seen no image."""
    one = trial(4, "running")
    assert (one.value, one.images_seen, one.seconds, one.ended) == (None, 0, 0.0, False)


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "of another trial": lambda text: text.replace('"number": 1', '"number": 2'),
    "unknown field": lambda text: text.replace('"state"', '"shape": 3, "state"'),
    "no values": lambda text: text.replace('"values"', '"worths"'),
    "values are a list": lambda text: json.dumps(json.loads(text) | {"values": [1.0]}),
    "number is text": lambda text: json.dumps(json.loads(text) | {"number": "1"}),
    "a list": lambda text: f"[{text}]",
    "unknown state": lambda text: text.replace('"stopped"', '"resting"'),
    "points are a number": lambda text: json.dumps(json.loads(text) | {"points": 3}),
    "a point without score": lambda text: text.replace('"value"', '"worth"'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_named(tmp_path, damage):
    """The error names the file and says what to do; with the file deleted the rest is there."""
    ledger = TrialLedger(LocalFolder(tmp_path))
    for one in TRIED[:3]:
        ledger.write(one)
    path = tmp_path / TRIALS / "0001.json"
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(ValueError, match=r"trials/0001\.json is damaged .*: delete it") as caught:
        TrialLedger(LocalFolder(tmp_path))
    assert str(tmp_path) in str(caught.value)
    path.unlink()
    assert TrialLedger(LocalFolder(tmp_path)).all() == [TRIED[0], TRIED[2]]


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b'{"seconds": "long"}', b"\xff"])
def test_a_damaged_time_is_named(tmp_path, content):
    """The time used up is read with the same care as a record."""
    (tmp_path / SPENT).write_bytes(content)
    with pytest.raises(ValueError, match=r"spent\.json is damaged .*: delete it"):
        TrialLedger(LocalFolder(tmp_path))


def test_other_files_are_no_records(tmp_path):
    """What is not JSON, or lies elsewhere in the place, is not read as a trial."""
    files = LocalFolder(tmp_path)
    TrialLedger(files).write(TRIED[0])
    files.write(f"{TRIALS}/0001.json.bak", b"nothing")
    files.write(f"{WORK}/0002/stage_two/state.json", b"nothing")
    assert TrialLedger(files).all() == [TRIED[0]]


def test_checkpoints_are_cleared_and_parts_stay(tmp_path):
    """Of the trial of this number only what it would have gone on from is removed."""
    files, ledger = LocalFolder(tmp_path), TrialLedger(LocalFolder(tmp_path))
    kept = [f"{WORK}/0001/parts-000000000100", f"{WORK}/0001/parts-000000000300"]
    kept += [f"{WORK}/0011/stage_two/checkpoints/step-000000010/state.pt", f"{TRIALS}/0001.json"]
    gone = [f"{WORK}/0001/stage_two/checkpoints/step-000000010/{n}" for n in ("state.pt", "mark")]
    gone.append(f"{WORK}/0001/stage_one/checkpoints/step-000000005/state.pt")
    ledger.write(trial(1))
    for name in [*kept[:3], *gone]:
        files.write(name, b"some")
    ledger.clear_checkpoints(1)
    assert sorted(info.name for info in files.walk()) == sorted(kept)
    ledger.clear_checkpoints(1)
    ledger.clear_checkpoints(7)


def test_a_ledger_is_pickled_without_its_place(tmp_path):
    """Tune keeps what it is given; a place that holds a lock or a client does not matter."""
    files = LocalFolder(tmp_path)
    files.client = threading.Lock()
    ledger = TrialLedger(files)
    ledger.write(TRIED[0])
    assert pickle.loads(pickle.dumps(ledger)).all() == [TRIED[0]]


def test_trials_are_ranked():
    """Those that came furthest are first, the best of them first; lower KID is better."""
    trials = [
        trial(0, "finished", point(100), point(300, 0.3)),
        trial(1, "finished", point(300, 0.2)),
        trial(2, "stopped", point(100, 0.01)),
        trial(3, "stopped", point(100, 0.02)),
        trial(4, "failed", point(300, 0.0)),
        trial(5, "running"),
        trial(6, "running", point(300, 0.3)),
        trial(7, "finished", point(300, -0.001)),
    ]
    kid, retrieval = SearchConfig(score="kid"), SearchConfig(score="retrieval")
    assert [one.number for one in order_of_merit(trials, kid)] == [7, 1, 0, 6, 2, 3]
    assert [one.number for one in order_of_merit(trials, retrieval)] == [0, 6, 1, 7, 3, 2]
    assert order_of_merit([], kid) == []
    assert (lower_is_better(kid), lower_is_better(retrieval)) == (True, False)

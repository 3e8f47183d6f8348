"""Points of a training: spooled by attempt, read by step, each step once."""

import json

from pipelines.points import POINTS, read_points, spooled_points, write_points
from sdn.data.files import LocalFolder
from sdn.journal import Journal


class Counting(LocalFolder):
    """A folder that counts what is read."""

    def __init__(self, path):
        super().__init__(path)
        self.reads = 0

    def read(self, name):
        self.reads += 1
        return super().read(name)


def spool(folder, attempt, *steps, **values):
    """Points of these steps in one file."""
    with Journal(LocalFolder(folder), f"points/{attempt:04d}", every_s=float("inf")) as journal:
        for step in steps:
            journal.add(step, {"time_ms": step, "attempt": attempt, **values})


def test_points_come_once_and_in_order(tmp_path):
    """Steps come ascending over attempts; one done again counts with its later values."""
    spool(tmp_path, 0, 20, 40, 60)
    spool(tmp_path, 1, 30, 60, 80)
    spool(tmp_path, 2, 70)
    found = spooled_points(LocalFolder(tmp_path))
    assert [point["step"] for point in found] == [20, 30, 40, 60, 70, 80]
    assert {p["step"]: p["attempt"] for p in found}[60] == 1


def test_only_what_is_new_is_read(tmp_path):
    """Files of an attempt that end before what is known already are not read again."""
    for first in (20, 120, 220):
        spool(tmp_path, 0, *range(first, first + 100, 20))
    files = Counting(tmp_path)
    assert [p["step"] for p in spooled_points(files, 239)] == [240, 260, 280, 300]
    assert files.reads == 1
    files.reads = 0
    assert [p["step"] for p in spooled_points(files, 200)] == list(range(220, 301, 20))
    assert files.reads == 2


def test_no_points_yet(tmp_path):
    """A training without a file, and a stage that is not trained, have no points."""
    assert spooled_points(LocalFolder(tmp_path / "absent")) == []
    assert list(read_points(tmp_path)) == []


def test_a_damaged_file_costs_only_its_own_points(tmp_path, caplog):
    """What cannot be read is left out with a warning; tracking goes on."""
    spool(tmp_path, 0, 20)
    spool(tmp_path, 1, 40)
    (tmp_path / "points" / "0000-000000020.jsonl.gz").write_bytes(b"not a gzip")
    assert [p["step"] for p in spooled_points(LocalFolder(tmp_path))] == [40]
    assert "0000-000000020" in caplog.text


def test_a_finished_stage_has_them_as_lines(tmp_path):
    """The file beside the result is plain JSON lines, one a point, nothing lost."""
    spool(tmp_path, 0, 20, 40, losses={"loss/image": 0.5}, text="two\nlines")
    write_points(LocalFolder(tmp_path), tmp_path)
    lines = (tmp_path / POINTS).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20, 40]
    assert next(iter(read_points(tmp_path)))["losses"] == {"loss/image": 0.5}

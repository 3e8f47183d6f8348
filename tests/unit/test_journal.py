"""Lines that survive their writer."""

import pytest

from sdn.data.files import LocalFolder
from sdn.journal import Journal, journal_files, read_lines


def lines(folder):
    files = LocalFolder(folder)
    return [line for name in journal_files(files, "log") for line in read_lines(files, name)]


def test_lines_come_back_in_order(tmp_path):
    """What was added and flushed is read back, whatever the values."""
    with Journal(LocalFolder(tmp_path), "log/0000", every_s=float("inf")) as journal:
        for step in range(5):
            journal.add(step, {"keys": ["a", "b\n"], "value": 0.5})
    assert [line["step"] for line in lines(tmp_path)] == list(range(5))
    assert lines(tmp_path)[3] == {"step": 3, "keys": ["a", "b\n"], "value": 0.5}


def test_flushed_lines_survive_without_a_close(tmp_path):
    """What `flush` has returned from is in the place, though the writer never ends well."""
    journal = Journal(LocalFolder(tmp_path), "log/0000", every_s=float("inf"))
    journal.add(0, {})
    journal.flush()
    journal.add(1, {})
    assert [line["step"] for line in lines(tmp_path)] == [0]


def test_a_thread_writes_by_itself(tmp_path):
    """Lines reach the place without a flush."""
    with Journal(LocalFolder(tmp_path), "log/0000", every_s=0.01) as journal:
        journal.add(0, {})
        for _ in range(1000):
            if lines(tmp_path):
                break
            journal._over.wait(0.01)
        assert [line["step"] for line in lines(tmp_path)] == [0]


def test_long_journals_are_cut_into_files(tmp_path):
    """After a quarter of a megabyte a new file begins, named by its first step."""
    with Journal(LocalFolder(tmp_path), "log/0000", every_s=float("inf")) as journal:
        for step in range(100):
            journal.add(step, {"text": "x" * 10_000})
    names = journal_files(LocalFolder(tmp_path), "log")
    assert len(names) > 3
    assert names == sorted(names)
    assert [line["step"] for line in lines(tmp_path)] == list(range(100))


class Failing(LocalFolder):
    broken = False

    def write(self, name, data):
        if self.broken:
            raise OSError(28, "No space left on device")
        super().write(name, data)


def test_a_write_that_fails_loses_nothing(tmp_path):
    """A flush says that the place is full; once there is room, the next one has all lines."""
    files = Failing(tmp_path)
    journal = Journal(files, "log/0000", every_s=float("inf"))
    journal.add(0, {})
    files.broken = True
    with pytest.raises(OSError, match="No space"):
        journal.flush()
    journal.add(1, {})
    files.broken = False
    journal.close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


def test_an_error_on_its_way_is_not_hidden(tmp_path):
    """Where the training fails and the last flush too, the training's error is the one raised."""
    files = Failing(tmp_path)

    def broken():
        with Journal(files, "log/0000", every_s=float("inf")) as journal:
            journal.add(0, {})
            files.broken = True
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        broken()

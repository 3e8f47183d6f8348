"""Feature vectors on disk: what was written is read, in any pieces."""

from __future__ import annotations

import pytest
import torch

from sdn.features.rows import HeldRows, Rows, RowWriter

TENSOR = torch.arange(70, dtype=torch.float32).reshape(10, 7)


@pytest.fixture(params=["file", "memory"])
def rows(request, tmp_path):
    """The same rows in a file, written in three pieces, and in memory."""
    if request.param == "memory":
        return HeldRows(TENSOR)
    with RowWriter(tmp_path / "rows.f32") as writer:
        for block in TENSOR.split(4):
            writer.write(block)
    return writer.rows()


def test_rows_come_back(rows):
    """Length, width and every value are those written."""
    assert (len(rows), rows.dim) == (10, 7)
    assert torch.equal(rows.read(0, 10), TENSOR)
    assert rows.read(0, 10).dtype == torch.float32


@pytest.mark.parametrize("size", [1, 3, 5, 10, 99])
def test_blocks_are_all_rows_in_order(rows, size):
    """Blocks of any size together are the whole, none larger than asked."""
    found = list(rows.blocks(size))
    assert torch.equal(torch.cat(found), TENSOR)
    assert [len(block) for block in found[:-1]] == [size] * (len(found) - 1)
    assert 0 < len(found[-1]) <= size


def test_reading_stops_at_the_end(rows):
    """More than there is gives what there is; beyond the end there is nothing."""
    assert torch.equal(rows.read(8, 99), TENSOR[8:])
    assert rows.read(10, 12).shape == (0, 7)


def test_a_part_is_such_rows_itself(rows):
    """Parts and parts of parts count from their own beginning and end where the whole does."""
    part = rows.part(2, 8)
    assert len(part) == 6
    assert torch.equal(part.read(0, 99), TENSOR[2:8])
    assert torch.equal(torch.cat(list(part.blocks(4))), TENSOR[2:8])
    assert torch.equal(part.part(1, 99).read(0, 99), TENSOR[3:8])
    assert torch.equal(part.part(3, 5).take([1, 0]), TENSOR[[6, 5]])
    assert len(rows.part(4, 4)) == 0
    assert list(rows.part(4, 4).blocks()) == []


def test_taking_rows_by_number(rows):
    """Any rows in any order, also twice, and none."""
    assert torch.equal(rows.take([9, 0, 9, 3]), TENSOR[[9, 0, 9, 3]])
    assert rows.take([]).shape == (0, 7)


def test_a_file_of_other_rows_is_refused(tmp_path):
    """A file that is cut off, or of another network, is named with what is to be done."""
    path = tmp_path / "rows.f32"
    with RowWriter(path) as writer:
        writer.write(TENSOR)
    with pytest.raises(ValueError, match="has 280 bytes, not a multiple of a row's 32: it is cut"):
        Rows(path, 8)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="delete its stage's folder"):
        Rows(path, 7)


def test_any_tensor_is_written_as_float32(tmp_path):
    """Half precision and strided views arrive as plain float32 rows."""
    with RowWriter(tmp_path / "rows") as writer:
        writer.write(TENSOR[:3].half())
        writer.write(TENSOR.T[:7, 3:].T[:, :7])
    assert torch.equal(writer.rows().read(0, 99), TENSOR)
    assert (tmp_path / "rows").stat().st_size == 280


def test_a_new_writer_begins_anew(tmp_path):
    """What an interrupted run left in the file is not in the next one's rows."""
    with RowWriter(tmp_path / "rows") as writer:
        writer.write(TENSOR)
    with RowWriter(tmp_path / "rows") as writer:
        writer.write(TENSOR[:2])
    assert len(writer.rows()) == 2


def test_the_file_is_closed_after_an_error(tmp_path):
    """An error inside closes the file and goes on its way."""
    with pytest.raises(RuntimeError, match="inside"), RowWriter(tmp_path / "rows") as writer:
        raise RuntimeError("inside")
    assert writer._file.closed

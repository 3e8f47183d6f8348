import io
import json
import pickle
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny_data import picture

from sdn.config import DataConfig
from sdn.data.files import LocalFolder
from sdn.data.images import encode
from sdn.data.preparation import Prepared, prepare
from sdn.data.records import DeadLetter, Record
from sdn.data.sources import partitions, read_source

REAL = Path(__file__).parents[3] / "shared" / "data" / "fashion"


def png(number=0):
    return encode(picture(number), "png")


def write(path, columns, schema=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns, schema=schema), path, **options)
    return path


def simple(path, rows=3, first=0, **options):
    numbers = range(first, first + rows)
    images = [{"bytes": png(n), "path": f"{n}.png"} for n in numbers]
    return write(path, {"image": images, "caption": [f"number {n}" for n in numbers]}, **options)


def config(root, **changes):
    return DataConfig(source="parquet", path=str(root), resolution=32, **changes)


def items(root, kind=Record, **changes):
    return [item for item in read_source(config(root, **changes)) if isinstance(item, kind)]


def only(root, kind=Record, **changes):
    (item,) = items(root, kind, **changes)
    return item


def failure(root, **changes):
    with pytest.raises(ValueError, match=r".") as raised:
        partitions(config(root, **changes))
    return str(raised.value)


def test_rows_become_records(tmp_path):
    """A row gives its image, caption, split, and a key and a place with its number."""
    simple(tmp_path / "data" / "train-00001-of-00004.parquet", row_group_size=2)
    records = {record.key: record for record in items(tmp_path)}
    assert list(records) == [f"data-train-00001-{row:07d}" for row in range(3)]
    record = records["data-train-00001-0000002"]
    assert record.image == png(2)
    assert record.captions == ("number 2",)
    assert record.split == "train"
    assert record.where == "data/train-00001-of-00004.parquet:2"


def test_partition_is_a_row_group_and_can_be_pickled(tmp_path):
    """Each row group is read by itself, on another machine too."""
    simple(tmp_path / "train.parquet", rows=7, row_group_size=3)
    pieces = list(partitions(config(tmp_path)))
    assert [len(list(piece.items())) for piece in pieces] == [3, 3, 1]
    for piece in pieces:
        assert list(pickle.loads(pickle.dumps(piece)).items()) == list(piece.items())


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("test.parquet", "test"),
        ("validation-0.parquet", "validation"),
        ("VAL/0000.parquet", "validation"),
        ("default/partial-train/0000.parquet", "train"),
        ("test/part/0.parquet", "test"),
        ("test/train-0.parquet", "train"),
    ],
)
def test_split_comes_from_the_name(tmp_path, name, split):
    """The file's name decides, else the nearest folder that begins with a split's name."""
    simple(tmp_path / name)
    assert {record.split for record in items(tmp_path)} == {split}


@pytest.mark.parametrize("name", ["0000.parquet", "trains.parquet", "latest/part.parquet"])
def test_split_is_drawn_where_no_name_tells_it(tmp_path, name):
    """By the hash of the image, with the configured shares."""
    simple(tmp_path / name, rows=30)
    splits = Counter(r.split for r in items(tmp_path, validation_share=0.3, test_share=0.3))
    assert set(splits) == {"train", "validation", "test"}


def test_validation_is_drawn_from_what_is_to_train_where_asked(tmp_path):
    """By the hash of the image; what other names say, stays."""
    names = ("train", "test", "validation")
    for name in names:
        simple(tmp_path / f"{name}.parquet", rows=30)
    assert all(record.where.startswith(record.split) for record in items(tmp_path))
    drawn = items(tmp_path, validation_share=0.3, validation_from_train=True)
    found = {name: Counter(r.split for r in drawn if r.where.startswith(name)) for name in names}
    assert found["test"] == {"test": 30}
    assert found["validation"] == {"validation": 30}
    assert found["train"]["train"] > found["train"]["validation"] > 0
    assert found["train"].total() == 30


def test_images_may_be_bytes_or_paths(tmp_path):
    """Plain bytes; a path beside the table or from the root; a struct with a path alone."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "beside.png").write_bytes(png(1))
    (tmp_path / "deep" / "below.png").write_bytes(png(2))
    simple_columns = {"text": ["a thing"]}
    write(tmp_path / "deep" / "a.parquet", {"jpg": [png(0)], **simple_columns})
    write(tmp_path / "deep" / "b.parquet", {"image_path": ["beside.png"], **simple_columns})
    write(tmp_path / "deep" / "c.parquet", {"file_name": ["deep/below.png"], **simple_columns})
    struct = [{"bytes": None, "path": "beside.png"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    write(tmp_path / "deep" / "d.parquet", {"img": pa.array(struct, kind), **simple_columns})
    images = {record.key[:6]: record.image for record in items(tmp_path)}
    assert images == {"deep-a": png(0), "deep-b": png(1), "deep-c": png(2), "deep-d": png(1)}


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret.png", "a/../../secret.png", "..\\secret.png", "a\0.png"]
)
def test_paths_that_lead_outside_are_refused(tmp_path, path):
    """They become dead letters; nothing outside the data's folder is read."""
    (tmp_path / "secret.png").write_bytes(png())
    write(tmp_path / "data" / "a.parquet", {"image": [path], "caption": ["a thing"]})
    letter = only(tmp_path / "data", DeadLetter)
    assert "inside the data's folder" in letter.reason
    assert letter.where == "a.parquet:0"


@pytest.mark.parametrize("path", ["missing.png", "http://example.org/a.png", "x" * 300 + ".png"])
def test_images_that_are_not_there_are_dead_letters(tmp_path, path):
    """An address or a name without a file is no image."""
    write(tmp_path / "a.parquet", {"image": [path], "caption": ["a thing"]})
    assert only(tmp_path, DeadLetter).key == "a-0000000"


def test_captions_may_be_lists(tmp_path):
    """All texts of a list are captions; blank ones and nulls are not."""
    captions = [["one", "", None, "two"], [], None, [" "]]
    write(tmp_path / "a.parquet", {"image": [png(n) for n in range(4)], "captions": captions})
    assert only(tmp_path).captions == ("one", "two")
    letters = items(tmp_path, DeadLetter)
    assert len(letters) == 3
    assert all("the column captions" in letter.reason for letter in letters)
    assert all(letter.image for letter in letters)


def test_null_images_are_dead_letters(tmp_path):
    """Null, empty bytes, or a struct with neither."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([None, {"bytes": b"", "path": None}, {"bytes": png(), "path": None}], kind)
    write(tmp_path / "a.parquet", {"image": images, "caption": ["a", "b", "c"]})
    assert [letter.where for letter in items(tmp_path, DeadLetter)] == [
        "a.parquet:0",
        "a.parquet:1",
    ]
    assert only(tmp_path).key == "a-0000002"


def test_fields_can_be_named(tmp_path):
    """Configured columns go before the usual ones."""
    columns = {"image": [png(0)], "caption": ["usual"], "photo": [png(1)], "alt": ["named"]}
    write(tmp_path / "a.parquet", columns)
    record = only(tmp_path, image_field="photo", caption_field="alt")
    assert (record.image, record.captions) == (png(1), ("named",))
    assert only(tmp_path).captions == ("usual",)


def test_texts_and_class_labels_become_labels(tmp_path):
    """Other columns of texts; and numbers to which Hugging Face's metadata gives names."""
    features = {
        "kind": {"names": ["bird", "flower"], "_type": "ClassLabel"},
        "n": {"_type": "Value"},
    }
    notes = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    fields = [("image", pa.binary()), ("text", pa.string()), ("colour", pa.string()),
              ("kind", pa.int64()), ("n", pa.int64()), ("prompt", pa.string())]  # fmt: skip
    columns = {
        "image": [png(0), png(1), png(2)],
        "text": ["a", "b", "c"],
        "colour": ["red", None, ""],
        "kind": [1, -1, 7],
        "n": [1, 2, 3],
        "prompt": ["no label", "but a", "caption too many"],
    }
    write(tmp_path / "a.parquet", columns, pa.schema(fields, metadata=notes))
    labels = [record.labels for record in items(tmp_path)]
    assert labels == [{"colour": "red", "kind": "flower"}, {}, {}]


@pytest.mark.parametrize("notes", [b"", b"[]", b"{", b'{"info": {"features": {"text": 3}}}'])
def test_foreign_metadata_is_ignored(tmp_path, notes):
    """Notes of another form do no harm."""
    schema = pa.schema([("image", pa.binary()), ("text", pa.string())], {b"huggingface": notes})
    write(tmp_path / "a.parquet", {"image": [png()], "text": ["a"]}, schema)
    assert only(tmp_path).captions == ("a",)


def test_missing_columns_are_named_at_once(tmp_path):
    """The error says which columns there are, and how to name one; also a wrong type."""
    path = write(tmp_path / "b.parquet", {"pixels": [png()], "caption": ["a"]})
    reason = failure(tmp_path)
    assert "b.parquet: no column with the image" in reason
    assert "pixels (binary), caption (string)" in reason
    assert "data.image_field=COLUMN" in reason
    assert "expected number" in failure(tmp_path, image_field="pixels", caption_field="number")
    path.unlink()
    write(tmp_path / "c.parquet", {"image": [png()], "caption": [3]})
    assert "no column with the caption" in failure(tmp_path)


def test_files_may_share_a_name(tmp_path):
    """Keys stay unique, fit for a tar, and do not depend on which other rows there are."""
    for name in ("a/x.parquet", "a-x.parquet", "a/x-of-4.parquet", f"{'l ö.' * 40}.parquet"):
        simple(tmp_path / name)
    records = items(tmp_path)
    assert len({record.key for record in records}) == 12
    assert all(isinstance(prepare(record, config(tmp_path)), Prepared) for record in records)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all" * 100, b"PAR1" + bytes(90)])
def test_file_that_is_no_parquet_is_one_dead_letter(tmp_path, content):
    """The others are read."""
    simple(tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes(content)
    assert only(tmp_path, DeadLetter).where == "bad.parquet"
    assert len(items(tmp_path)) == 3


def test_damaged_row_group_is_a_dead_letter(tmp_path):
    """The other row groups are read; a record that comes is the one that was written."""
    path = simple(tmp_path / "a.parquet", rows=9, row_group_size=3,
                  write_page_checksum=True, use_dictionary=False)  # fmt: skip
    whole = {record.key: record for record in items(tmp_path)}
    content = bytearray(path.read_bytes())
    column = parquet.read_metadata(path).row_group(1).column(0)
    content[column.data_page_offset + column.total_compressed_size - 2000] ^= 0x55
    path.write_bytes(content)
    assert only(tmp_path, DeadLetter).where == "a.parquet:row group 1"
    read = {record.key: record for record in items(tmp_path)}
    assert len(read) == 6
    assert read.items() <= whole.items()


def test_any_cut_and_flip_ends_in_dead_letters(tmp_path):
    """Damage is never an exception out of items."""
    path = simple(tmp_path / "a.parquet", rows=4, row_group_size=2)
    whole = path.read_bytes()
    assert len(whole) > 10_000
    variants = [whole[:cut] for cut in range(0, len(whole), 997)]
    for at in [*range(0, len(whole), 499), *range(len(whole) - 1500, len(whole), 13)]:
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        variants.append(bytes(content))
    for content in variants:
        path.write_bytes(content)
        try:
            pieces = list(partitions(config(tmp_path)))
        except ValueError as error:
            assert "no column with the" in str(error)  # noqa: PT017  (a flip in a column's name)
            continue
        for piece in pieces:
            list(piece.items())


class Unreachable(LocalFolder):
    """A place that goes away while a file of it is read."""

    def open(self, name):
        class Failing(io.BytesIO):
            def read(self, size=-1):
                if self.tell() < 100_000:
                    raise OSError("the server does not answer")
                return super().read(size)

        return Failing(self.read(name))


def test_place_that_cannot_be_reached_is_no_damage(tmp_path):
    """An OSError of the place comes through; only damaged content makes dead letters."""
    simple(tmp_path / "a.parquet", rows=60)
    (piece,) = partitions(config(tmp_path), Unreachable(tmp_path))
    with pytest.raises(OSError, match="the server does not answer"):
        list(piece.items())


def test_missing_files_path_and_pyarrow_are_explained(tmp_path, monkeypatch):
    """The error says what is expected, what was found and what to do."""
    (tmp_path / "notes.txt").write_text("nothing")
    assert "has no *.parquet; found notes.txt" in failure(tmp_path)
    with pytest.raises(ValueError, match=r"data\.path is not set: the source 'parquet' needs"):
        partitions(DataConfig(source="parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install"):
        partitions(config(tmp_path))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real data at {REAL}")
def test_real_data_is_read_whole():
    """All 39,800 rows of the fashion set come once, with caption, labels and split."""
    splits, keys = Counter(), set()
    for item in read_source(config(REAL)):
        assert isinstance(item, Record)
        assert item.image[:2] == b"\xff\xd8"
        assert item.captions[0].strip()
        assert set(item.labels) <= {
            "master_category", "sub_category", "article_type", "colour", "usage",
        }  # fmt: skip
        assert item.where.startswith(item.split)
        splits[item.split] += 1
        keys.add(item.key)
    assert splits == {"train": 35_291, "test": 4_509}
    assert len(keys) == 39_800

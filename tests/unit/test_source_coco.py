import json
import pickle

import pytest
from tiny_data import picture

from sdn.config import DataConfig
from sdn.data.files import LocalFolder
from sdn.data.images import encode
from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources import coco_annotations, partitions, read_source
from sdn.data.sources.coco_annotations import entries


def annotate(root, group, images, annotations, /, **changes):
    """An annotation file with `images` as (id, file name), `annotations` as (image id, caption)."""
    values = {
        "info": {"year": 2017, "nested": [1, {"a": "]"}]},
        "images": [{"id": number, "file_name": name, "width": 32} for number, name in images],
        "licenses": [],
        "annotations": [
            {"id": 100 + n, "image_id": number, "caption": caption}
            for n, (number, caption) in enumerate(annotations)
        ],
    }
    path = root / "annotations" / f"captions_{group}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values | changes, indent=1))
    return path


def image(root, name, number=0):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(picture(number), "jpg"))


def build(root, train=40, val=5):
    for group, count in (("train2017", train), ("val2017", val)):
        names = [f"{n:012d}.jpg" for n in range(1, count + 1)]
        captions = [(n, f"{group} {n} number {c}") for c in range(3) for n in range(1, count + 1)]
        annotate(root, group, list(enumerate(names, start=1)), captions)
        for n, name in enumerate(names, start=1):
            image(root, f"{group}/{name}", n + 1000 * (group == "val2017"))
    return root


def config(root, **changes):
    return DataConfig(source="coco", path=str(root), **changes)


def items(root, kind=Record, **changes):
    return [item for item in read_source(config(root, **changes)) if isinstance(item, kind)]


def failure(root):
    with pytest.raises(ValueError, match=r".") as raised:
        partitions(config(root))
    return str(raised.value)


def test_captions_are_grouped_by_image(tmp_path):
    """An image comes once, with all its captions in their order, though they lie apart."""
    records = {record.key: record for record in items(build(tmp_path))}
    assert len(records) == 45
    record = records["train2017-000000000007"]
    assert record.captions == tuple(f"train2017 7 number {c}" for c in range(3))
    assert record.image == (tmp_path / "train2017" / "000000000007.jpg").read_bytes()
    assert record.where == "train2017/000000000007.jpg"
    assert record.labels == {}


def test_val_is_the_test_split(tmp_path):
    """The images of val are tested on; those of train are split with the configured shares."""
    records = items(build(tmp_path), validation_share=0.3, test_share=0.3)
    assert {r.split for r in records if r.key.startswith("val")} == {"test"}
    train = [r.split for r in records if r.key.startswith("train")]
    assert {"train", "validation", "test"} == set(train)
    everything = items(tmp_path, validation_share=0, test_share=0)
    assert {r.split for r in everything if r.key.startswith("train")} == {"train"}


def test_partitions_can_be_pickled_and_read_again(tmp_path):
    """A partition gives the same items on another machine, any number of times."""
    for partition in partitions(config(build(tmp_path))):
        copy = pickle.loads(pickle.dumps(partition))
        assert list(copy.items()) == list(partition.items()) == list(partition.items())


@pytest.mark.parametrize("folder", ["things", "train2017", "val2017", "images", ""])
def test_images_are_found_in_the_usual_folders(tmp_path, folder):
    """The folder named as the annotations, the usual ones, or the root."""
    image(tmp_path, f"{folder}/a.jpg".lstrip("/"))
    annotate(tmp_path, "things", [(1, "a.jpg")], [(1, "a thing")])
    (record,) = items(tmp_path)
    assert record.where == f"{folder}/a.jpg".lstrip("/")


def test_folder_of_the_same_name_comes_first(tmp_path):
    """Images of train and val may have the same names."""
    image(tmp_path, "train2017/a.jpg", 1)
    image(tmp_path, "val2017/a.jpg", 2)
    annotate(tmp_path, "val2017", [(1, "a.jpg")], [(1, "a thing")])
    (record,) = items(tmp_path)
    assert record.where == "val2017/a.jpg"


def test_image_without_captions_is_excluded(tmp_path):
    """It is counted under one reason."""
    image(tmp_path, "images/a.jpg")
    annotate(tmp_path, "train2017", [(1, "a.jpg"), (2, "b.jpg")], [(1, "a thing")])
    assert [item.reason for item in items(tmp_path, Exclusion)] == ["an image without captions"]
    assert len(items(tmp_path)) == 1


def test_bad_entries_are_dead_letters(tmp_path):
    """Each names its place in the file; the good ones are used."""
    image(tmp_path, "images/a.jpg")
    annotate(
        tmp_path,
        "train2017",
        [(1, "a.jpg"), (1, "again.jpg"), (3, "../secret.jpg"), (4, "/etc/passwd"), (5, None),
         ("six", "f.jpg"), (True, "g.jpg"), (8, "missing.jpg"), (9, "a\0.jpg"), (10, "x" * 300)],
        [(1, "a thing"), (77, "of nobody"), (1, " "), (1, None), (8, "not there")],
    )  # fmt: skip
    letters = {letter.where.split(":")[-1]: letter for letter in items(tmp_path, DeadLetter)}
    assert "an earlier image has the same id, 1" in letters["images[1]"].reason
    for number in (2, 3, 8):
        assert "inside the data's folder" in letters[f"images[{number}]"].reason
    assert "file_name is a text" in letters["images[4]"].reason
    assert "id is a number" in letters["images[5]"].reason
    assert "id is a number" in letters["images[6]"].reason
    assert "longer" in letters["images[9]"].reason
    assert "no image has the id 77" in letters["annotations[1]"].reason
    assert "caption is a text" in letters["annotations[2]"].reason
    assert "caption is a text" in letters["annotations[3]"].reason
    assert "there is no file train2017/missing.jpg" in letters["missing.jpg"].reason
    assert len(letters) == 12
    assert [record.captions for record in items(tmp_path)] == [("a thing",)]


def test_entries_that_are_no_objects_are_dead_letters(tmp_path):
    """Whatever JSON there is in the lists."""
    image(tmp_path, "images/a.jpg")
    good = {"id": 1, "file_name": "a.jpg"}
    annotate(tmp_path, "x", [], [(1, "a thing")], images=[good, None, 3, "text", [1], {}])
    assert len(items(tmp_path, DeadLetter)) == 5
    assert len(items(tmp_path)) == 1


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1 << 20])
def test_pieces_of_any_length_give_the_same_entries(tmp_path, monkeypatch, piece):
    """Reading by pieces finds what json.load does, wherever the text is cut."""
    values = [1, -2.5e10, 123456, 'a"]},\\', "größe \U0001f426", None, True, [], {}, {"a": [{}]}]
    path = annotate(tmp_path, "x", [], [], annotations=values)
    monkeypatch.setattr(coco_annotations, "_PIECE", piece)
    name = "annotations/captions_x.json"
    assert list(entries(LocalFolder(tmp_path), name, "annotations")) == values
    assert list(entries(LocalFolder(tmp_path), name, "nothing")) == []
    path.write_text(json.dumps({"annotations": values}, ensure_ascii=False), encoding="utf-8-sig")
    assert list(entries(LocalFolder(tmp_path), name, "annotations")) == values
    path.write_text(" {} ")
    assert list(entries(LocalFolder(tmp_path), name, "annotations")) == []


def test_damaged_annotations_are_named(tmp_path):
    """Cut off anywhere, or no JSON at all: the error names the file, before anything is read."""
    path = annotate(tmp_path, "train2017", [(1, "a.jpg")], [(1, "a thing")])
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert "captions_train2017.json must be an annotation file" in failure(tmp_path)
    for bad in (b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}}', b'{"images": [1 2]}'):
        path.write_bytes(bad)
        assert "captions_train2017.json must be an annotation file" in failure(tmp_path)


def test_endless_entry_is_refused(tmp_path, monkeypatch):
    """A file that is one huge value is not taken into memory."""
    monkeypatch.setattr(coco_annotations, "_LARGEST", 1000)
    monkeypatch.setattr(coco_annotations, "_PIECE", 100)
    path = annotate(tmp_path, "x", [], [])
    path.write_text('{"images": ["' + "x" * 10_000 + '"]}')
    assert "an entry of more than 1000 characters" in failure(tmp_path)


def test_missing_annotations_and_path_are_explained(tmp_path):
    """The error says what is expected, what was found and what to do."""
    image(tmp_path, "val2017/a.jpg")
    reason = failure(tmp_path)
    assert "lacks annotations/captions_*.json" in reason
    assert "found val2017/a.jpg" in reason
    with pytest.raises(ValueError, match=r"data\.path is not set: the source 'coco' needs"):
        partitions(DataConfig(source="coco"))

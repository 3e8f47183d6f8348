import pickle
import sys

import numpy as np
import pytest
from scipy.io import savemat
from tiny_data import picture

from sdn.config import DataConfig
from sdn.data.images import encode
from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources import partitions, read_source

EACH = 8
CLASSES = (1, 2, 3)


def build(root):
    """The published layout: 8 images each of the classes 1, 2 (to train on) and 3 (to test on)."""
    labels = []
    (root / "jpg").mkdir()
    for number in range(1, EACH * len(CLASSES) + 1):
        flower = CLASSES[number % len(CLASSES)]
        labels.append(flower)
        (root / "jpg" / f"image_{number:05d}.jpg").write_bytes(encode(picture(number), "jpg"))
        text = root / "text_c10" / f"class_{flower:05d}" / f"image_{number:05d}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(f"flower {number}\n\nit has petals\n")
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    (root / "trainvalclasses.txt").write_text("class_00001\nclass_00002\n")
    (root / "testclasses.txt").write_text("class_00003\n")
    return root


def config(root, **changes):
    return DataConfig(source="flowers", path=str(root), **changes)


def items(root, kind=Record, **changes):
    return [item for item in read_source(config(root, **changes)) if isinstance(item, kind)]


def only(root, kind):
    (item,) = items(root, kind)
    return item


def failure(root):
    with pytest.raises(ValueError, match=r".") as raised:
        list(read_source(config(root)))
    return str(raised.value)


def test_images_come_whole_with_captions_and_class(tmp_path):
    """A record holds the file, its captions, its class as the label concept, and its place."""
    records = {record.key: record for record in items(build(tmp_path))}
    assert len(records) == EACH * len(CLASSES)
    record = records["image_00001"]
    assert record.image == (tmp_path / "jpg" / "image_00001.jpg").read_bytes()
    assert record.captions == ("flower 1", "it has petals")
    assert record.labels == {"concept": "class_00002"}
    assert record.where == "jpg/image_00001.jpg"


def test_test_split_is_the_test_classes(tmp_path):
    """All of a test class is tested on, nothing else; validation is drawn from the others."""
    records = items(build(tmp_path), validation_share=0.5, test_share=0.4)
    splits = {(record.split, record.labels["concept"]) for record in records}
    assert {flower for split, flower in splits if split == "test"} == {"class_00003"}
    assert {flower for split, flower in splits if split != "test"} == {"class_00001", "class_00002"}
    assert {split for split, _ in splits} == {"train", "validation", "test"}


def test_partitions_can_be_pickled_and_read_again(tmp_path):
    """A partition gives the same items on another machine, any number of times."""
    for partition in partitions(config(build(tmp_path))):
        copy = pickle.loads(pickle.dumps(partition))
        assert list(copy.items()) == list(partition.items()) == list(partition.items())


def test_class_in_neither_list_is_excluded(tmp_path):
    """A class that no list names is left out, all under one reason."""
    (build(tmp_path) / "trainvalclasses.txt").write_text("class_00001\n")
    assert len(items(tmp_path)) == 2 * EACH
    reasons = {item.reason for item in items(tmp_path, Exclusion)}
    assert reasons == {"its class is in neither list of classes"}


def test_label_and_folder_must_agree(tmp_path):
    """A text in the folder of another class is a dead letter that keeps the image."""
    build(tmp_path)
    text = tmp_path / "text_c10" / "class_00002" / "image_00001.txt"
    text.rename(tmp_path / "text_c10" / "class_00001" / "image_00001.txt")
    letter = only(tmp_path, DeadLetter)
    assert letter.key == "image_00001"
    assert "imagelabels.mat says class_00002" in letter.reason
    assert "class_00001" in letter.reason
    assert letter.image == (tmp_path / "jpg" / "image_00001.jpg").read_bytes()


def test_missing_and_empty_parts_of_an_image_are_dead_letters(tmp_path):
    """No text, an empty text, no image, a number without a label: a dead letter each."""
    build(tmp_path)
    texts = tmp_path / "text_c10"
    (texts / "class_00002" / "image_00001.txt").unlink()
    (texts / "class_00003" / "image_00002.txt").write_text(" \n")
    (tmp_path / "jpg" / "image_00003.jpg").unlink()
    (tmp_path / "jpg" / "image_00099.jpg").write_bytes(b"x")
    letters = {letter.key: letter.reason for letter in items(tmp_path, DeadLetter)}
    assert "expected text_c10/class_00002/image_00001.txt" in letters["image_00001"]
    assert "holds no caption" in letters["image_00002"]
    assert "jpg/image_00003.jpg cannot be read" in letters["image_00003"]
    assert "a number that imagelabels.mat has a class for" in letters["image_00099"]
    assert len(letters) == 4


@pytest.mark.parametrize(
    "part", ["imagelabels.mat", "jpg", "text_c10", "trainvalclasses.txt", "testclasses.txt"]
)
def test_missing_part_is_named(tmp_path, part):
    """The error says what is missing, before anything is read."""
    path = build(tmp_path) / part
    path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    with pytest.raises(ValueError, match=f"lacks {part}"):
        partitions(config(tmp_path))


def test_lists_share_no_class(tmp_path):
    """A class in both lists is refused and named."""
    (build(tmp_path) / "testclasses.txt").write_text("class_00003\nclass_00001")
    assert "must share no class, both name class_00001" in failure(tmp_path)


def test_lists_hold_classes(tmp_path):
    """Lines that are no classes are refused, and so are empty lists."""
    (build(tmp_path) / "testclasses.txt").write_text("003.Green_Bird")
    assert "but has '003.Green_Bird'" in failure(tmp_path)
    for name in ("testclasses.txt", "trainvalclasses.txt"):
        (tmp_path / name).write_text("")
    assert "are empty" in failure(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no MATLAB file" * 20, b"MATLAB 5.0 MAT-file" * 9])
def test_damaged_labels_are_named(tmp_path, content):
    """A file that scipy cannot read leads to an error that names it."""
    (build(tmp_path) / "imagelabels.mat").write_bytes(content)
    assert "imagelabels.mat must be the published MATLAB file" in failure(tmp_path)


def test_folder_below_is_recognised(tmp_path):
    """Somebody who gives the folder jpg is told to give the one above."""
    assert "data.path must be the folder above jpg/" in failure(build(tmp_path) / "jpg")


def test_no_path_and_no_scipy_are_explained(tmp_path, monkeypatch):
    """Without data.path, or without scipy, the error says what to do."""
    with pytest.raises(ValueError, match=r"data\.path is not set: the source 'flowers' needs"):
        list(read_source(DataConfig(source="flowers")))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match="pip install"):
        partitions(config(build(tmp_path)))

import io
import pickle
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from tiny_data import picture

from sdn.config import DataConfig
from sdn.data.images import encode
from sdn.data.preparation import Prepared, prepare
from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources import PARTITION_RECORDS, partitions, read_source

REAL = Path(__file__).parents[3] / "shared" / "data" / "cub"
TRAINED = ("001.Red_Bird", "002.Blue_Bird")
TESTED = "003.Green_Bird"


def build(root, birds=(*TRAINED, TESTED), each=10):
    """The published layout with `each` images of each class."""
    published = root / "CUB_200_2011"
    lines = []
    for bird in birds:
        images, texts = published / "images" / bird, root / "text_c10" / bird
        images.mkdir(parents=True)
        texts.mkdir(parents=True)
        for _ in range(each):
            number = len(lines) + 1
            name = f"{bird[4:]}_{number:04d}_7"
            lines.append(f"{number} {bird}/{name}.jpg")
            (images / f"{name}.jpg").write_bytes(encode(picture(number), "jpg"))
            (texts / f"{name}.txt").write_text(f"a {bird}\nit has wings\n", encoding="utf-8")
    (published / "images.txt").write_text("\n".join(lines) + "\n")
    (root / "trainvalclasses.txt").write_text("\n".join(TRAINED))
    (root / "testclasses.txt").write_text(TESTED)
    return root


def items(root, kind=Record, **changes):
    config = DataConfig(source="cub", path=str(root), resolution=32, **changes)
    return [item for item in read_source(config) if isinstance(item, kind)]


def sizes(number):
    """How many items the partitions of so many entries have."""
    whole, rest = divmod(number, PARTITION_RECORDS)
    return [PARTITION_RECORDS] * whole + [rest] * (rest > 0)


def failure(root):
    with pytest.raises(ValueError, match=r".") as raised:
        items(root)
    return str(raised.value)


def test_images_come_whole_with_captions_and_class(tmp_path):
    """A record holds the file as published, its captions in order, and its class as a label."""
    records = {record.key: record for record in items(build(tmp_path))}
    assert len(records) == 30
    record = records["Red_Bird_0001_7"]
    published = tmp_path / "CUB_200_2011" / "images" / "001.Red_Bird" / "Red_Bird_0001_7.jpg"
    assert record.image == published.read_bytes()
    assert record.captions == ("a 001.Red_Bird", "it has wings")
    assert record.labels == {"concept": "001.Red_Bird"}


def test_test_split_is_the_test_classes(tmp_path):
    """All images of a test class and no others are tested on, whatever test_share says."""
    for share in (0.0, 0.5):
        records = items(build(tmp_path / str(share)), test_share=share)
        tested = {record.labels["concept"] for record in records if record.split == "test"}
        trained = {record.labels["concept"] for record in records if record.split != "test"}
        assert tested == {TESTED}
        assert trained == set(TRAINED)


def test_validation_is_a_share_of_the_training_classes(tmp_path):
    """Validation takes about its share of the rest; none where the share is 0."""
    build(tmp_path, each=100)
    counts = Counter(record.split for record in items(tmp_path, validation_share=0.25))
    assert counts["test"] == 100
    assert 30 <= counts["validation"] <= 70
    assert "validation" not in {record.split for record in items(tmp_path, validation_share=0)}


def test_two_reads_are_equal_and_a_beginning_has_every_class(tmp_path):
    """The order is fixed, and such that a limit takes some of every class."""
    build(tmp_path)
    assert items(tmp_path) == items(tmp_path)
    classes = {record.labels["concept"] for record in items(tmp_path)[:12]}
    assert classes == {*TRAINED, TESTED}


def test_image_without_text_is_a_dead_letter(tmp_path):
    """A missing text, an empty one and a missing image cost that image only, with a reason."""
    build(tmp_path)
    texts = tmp_path / "text_c10" / "001.Red_Bird"
    (texts / "Red_Bird_0001_7.txt").unlink()
    (texts / "Red_Bird_0002_7.txt").write_text("\n")
    images = tmp_path / "CUB_200_2011" / "images" / "001.Red_Bird"
    (images / "Red_Bird_0003_7.jpg").unlink()
    reasons = {dead.key: dead.reason for dead in items(tmp_path, DeadLetter)}
    assert reasons == {
        "Red_Bird_0001_7": "no captions: expected text_c10/001.Red_Bird/Red_Bird_0001_7.txt",
        "Red_Bird_0002_7": "Red_Bird_0002_7.txt holds no caption: expected one a line",
        "Red_Bird_0003_7": "the image cannot be read: No such file or directory",
    }
    assert len(items(tmp_path)) == 27


def test_broken_blanks_become_blanks(tmp_path):
    """The replacement characters that some published texts hold between words are blanks."""
    build(tmp_path)
    text = tmp_path / "text_c10" / "001.Red_Bird" / "Red_Bird_0001_7.txt"
    text.write_text("this\ufffd\ufffdbird\ufffd\ufffdis red\n", encoding="utf-8")
    records = {record.key: record for record in items(tmp_path)}
    assert records["Red_Bird_0001_7"].captions == ("this  bird  is red",)


def test_class_in_neither_list_is_excluded_and_counted(tmp_path):
    """An image of a class that no list knows is left out by rule, not lost."""
    build(tmp_path, birds=(*TRAINED, TESTED, "004.Unlisted_Bird"))
    excluded = items(tmp_path, Exclusion)
    assert len(excluded) == 10
    assert {item.reason for item in excluded} == {"its class is in neither list of classes"}
    assert len(items(tmp_path)) == 30


@pytest.mark.parametrize(
    "part",
    ["CUB_200_2011/images.txt", "trainvalclasses.txt", "testclasses.txt"],
)
def test_missing_part_is_named(tmp_path, part):
    """Where one part of the layout is missing, the error names that part and no other."""
    build(tmp_path)
    (tmp_path / part).unlink()
    text = failure(tmp_path)
    assert part in text
    assert text.count("(") == 1  # one part, with where it comes from
    assert f"{tmp_path} lacks" in text


def test_all_missing_parts_are_named_at_once(tmp_path):
    """An empty folder is told everything that it lacks."""
    text = failure(tmp_path)
    for part in ("images.txt", "CUB_200_2011/images ", "text_c10", "trainvalcl", "testclasses"):
        assert part in text


def test_folder_must_be_named():
    """Without data.path the error says what the folder must hold."""
    with pytest.raises(ValueError, match=r"data\.path is not set.*CUB_200_2011/, text_c10/"):
        partitions(DataConfig(source="cub"))


def test_contradicting_lists_are_refused(tmp_path):
    """A class cannot be trained and tested on; lists without a known class are of no use."""
    build(tmp_path)
    (tmp_path / "testclasses.txt").write_text("\n".join([TESTED, TRAINED[0]]))
    assert "must share no class, but both name 001.Red_Bird" in failure(tmp_path)
    (tmp_path / "trainvalclasses.txt").write_text("Red Bird\n")
    (tmp_path / "testclasses.txt").write_text("Green Bird\n")
    assert "no image of CUB_200_2011/images.txt is of a class in" in failure(tmp_path)


def test_unreadable_list_of_images_names_the_line(tmp_path):
    """A line of images.txt without a class is refused with its number."""
    build(tmp_path)
    listed = tmp_path / "CUB_200_2011" / "images.txt"
    listed.write_text(listed.read_text() + "31 lonely.jpg\n")
    assert "line 31 is '31 lonely.jpg'" in failure(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="no copy of CUB-200-2011 in ../shared/data/cub")
def test_published_data_set_is_read():
    """Eight published classes: every image with ten captions, two classes tested on."""
    records = items(REAL)
    assert len(records) == 436
    assert items(REAL, DeadLetter) == []
    assert {len(record.captions) for record in records} == {10}
    assert not any("\ufffd" in caption for record in records for caption in record.captions)
    assert len({record.key for record in records}) == 436
    tested = {record.labels["concept"] for record in records if record.split == "test"}
    assert tested == {"001.Black_footed_Albatross", "006.Least_Auklet"}
    assert {record.split for record in records} == {"train", "validation", "test"}
    config = DataConfig(source="cub", resolution=32)
    assert all(isinstance(prepare(record, config), Prepared) for record in records[:20])


@pytest.mark.skipif(not REAL.is_dir(), reason="no copy of CUB-200-2011 in ../shared/data/cub")
def test_published_boxes_cut_the_birds_out():
    """With the fit box each published image has its box, inside the image, and can be prepared."""
    records = items(REAL, fit="box")
    config = DataConfig(source="cub", resolution=32, fit="box")
    for record in records:
        left, top, width, height = record.box
        with Image.open(io.BytesIO(record.image)) as image:
            assert 0 <= left < left + width <= image.width + 1
            assert 0 <= top < top + height <= image.height + 1
    assert all(isinstance(prepare(record, config), Prepared) for record in records[:20])
    # Number 1 of both lists; the copy's images and boxes are smaller than the published ones.
    first = next(r for r in records if r.key == "Black_Footed_Albatross_0046_18")
    line = (REAL / "CUB_200_2011" / "bounding_boxes.txt").read_text().splitlines()[0]
    assert line == " ".join(str(value) for value in (1, *first.box))


def boxes(root, lines):
    (root / "CUB_200_2011" / "bounding_boxes.txt").write_text("\n".join(lines) + "\n")


def test_box_of_the_list_comes_with_each_record(tmp_path):
    """The fit box takes boxes by the number of the image; without a line prepare refuses it."""
    build(tmp_path)
    boxes(tmp_path, [f"{n} {n}.0 2.5 {n + 10}.0 9.0" for n in range(30, 1, -1)])
    read = {record.key: record for record in items(tmp_path, fit="box")}
    assert len(read) == 30
    assert read["Red_Bird_0003_7"].box == (3.0, 2.5, 13.0, 9.0)
    assert read["Red_Bird_0001_7"].box is None
    dead = prepare(read["Red_Bird_0001_7"], DataConfig(source="cub", resolution=32, fit="box"))
    assert isinstance(dead, DeadLetter)
    assert dead.reason.startswith("no box")


def test_boxes_are_needed_for_the_fit_box_only(tmp_path):
    """A missing list of boxes is named where it is needed, and a broken line too."""
    build(tmp_path)
    assert {record.box for record in items(tmp_path)} == {None}
    with pytest.raises(ValueError, match=r"lacks CUB_200_2011/bounding_boxes\.txt \(the bounding"):
        items(tmp_path, fit="box")
    boxes(tmp_path, ["1 1 2 3 4", "2 1 2 3"])
    with pytest.raises(ValueError, match=r"left, top, width, height\), but line 2 is '2 1 2 3'"):
        items(tmp_path, fit="box")
    assert len(items(tmp_path)) == 30


def test_faults_in_the_layout_show_before_the_first_partition(tmp_path):
    """The call itself refuses an unfit folder, not the first look at its result."""
    with pytest.raises(ValueError, match="lacks"):
        partitions(DataConfig(source="cub", path=str(tmp_path)))


def test_partitions_can_be_sent_and_read_again(tmp_path):
    """A pickled partition gives the same items, any number of times."""
    build(tmp_path, each=100)
    pieces = list(partitions(DataConfig(source="cub", path=str(tmp_path), resolution=32)))
    assert [len(list(piece.items())) for piece in pieces] == sizes(300)
    for piece in pieces:
        copy = pickle.loads(pickle.dumps(piece))
        assert list(copy.items()) == list(copy.items()) == list(piece.items())


def test_record_and_dead_letter_say_where_they_come_from(tmp_path):
    """Both name the image's file; a dead letter keeps the image if it could be read."""
    build(tmp_path)
    (tmp_path / "text_c10" / "001.Red_Bird" / "Red_Bird_0001_7.txt").unlink()
    (dead,) = items(tmp_path, DeadLetter)
    assert dead.where == "CUB_200_2011/images/001.Red_Bird/Red_Bird_0001_7.jpg"
    assert dead.image == (tmp_path / dead.where).read_bytes()
    assert all((tmp_path / record.where).read_bytes() == record.image for record in items(tmp_path))

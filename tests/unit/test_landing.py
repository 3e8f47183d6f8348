"""What counts as arrived: new, whole, no longer written to, and with all that belongs to it."""

from __future__ import annotations

import dataclasses
import gzip
import io
import pickle
import tarfile

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landing_place import FOLDER, NOW, OLD, LandingPlace, names, picture, reasons
from pyarrow import parquet

from sdn.data.files import FileInfo, LocalFolder
from sdn.data.landing import Look, Marks, arrived
from sdn.data.sources import read_source


@pytest.fixture
def place(tmp_path):
    return LandingPlace(tmp_path / "landing")


def tar(number):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in ((f"{number}.png", picture(number)), (f"{number}.txt", b"a picture")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_what_is_there_is_taken_once(place):
    """A second look after taking finds what came since, and nothing else; no look waits."""
    place.pair(1)
    place.pair(2)
    first = place.look()
    assert (first.new, first.waiting) == (2, ())
    assert names(first) == ["picture001.png", "picture001.txt", "picture002.png", "picture002.txt"]
    place.take(first)
    assert place.look().new == 0
    place.pair(3)
    again = place.look()
    assert names(again) == ["picture003.png", "picture003.txt"]
    assert place.waits == []


def test_a_file_that_grows_is_left_and_taken_later(place):
    """What changes during the one wait of a look is left, what does not is taken by that look."""
    place.pair(1, age=1)
    place.put("picture002.txt", "two\n")
    place.put("picture002.png", picture(2)[:500], age=1)
    found = place.look(meanwhile=lambda: place.put("picture002.png", picture(2)[:900], age=0))
    assert names(found) == ["picture001.png", "picture001.txt"]
    assert "still changes" in reasons(found)["picture002.png"]
    assert place.waits == [5]
    place.take(found)
    place.put("picture002.png", picture(2))
    assert names(place.look()) == ["picture002.png", "picture002.txt"]


def test_a_clock_that_is_behind_takes_nothing_unseen(place):
    """A file from the future is new, too: it is looked at twice."""
    place.pair(1, age=-3600)
    assert place.look().new == 1
    assert place.waits == [5]


def test_what_vanishes_meanwhile_is_no_error(place):
    """A file that is taken away during a look is left out of it."""
    place.pair(1)
    place.put("gone.png", picture(2), age=0)
    found = place.look(meanwhile=(place.path / "gone.png").unlink)
    assert names(found) == ["picture001.png", "picture001.txt"]


@pytest.mark.parametrize(
    "name",
    ["a.png.part", "a.tmp", "b.crdownload", "c.txt~", ".hidden.png", "deep/~$d.txt", "e.png.swp"],
)
def test_names_of_unfinished_files_are_passed_over(place, name):
    """Temporary files are neither taken nor told of."""
    place.pair(1)
    place.put(name, picture(2))
    found = place.look()
    assert found.new == 1
    assert found.waiting == ()


def test_an_image_waits_for_its_caption_and_a_caption_for_its_image(place):
    """Halves wait, in whichever order they come, and are no dead letters."""
    place.pair(1)
    place.put("early.png", picture(2))
    place.put("words.txt", "words\n")
    found = place.look()
    assert names(found) == ["picture001.png", "picture001.txt"]
    assert set(reasons(found)) == {"early.png", "words.txt"}
    assert "no caption yet" in reasons(found)["early.png"]
    place.take(found)
    place.put("early.txt", "early\n")
    place.put("words.jpg", picture(3, "JPEG"))
    assert names(place.look()) == ["early.png", "early.txt", "words.jpg", "words.txt"]


def test_a_half_that_changes_is_read_again_with_the_other(place):
    """A new caption of a taken image, and a new image of a taken caption, come as whole pairs."""
    for number in (1, 2, 3):
        place.pair(number)
    place.take(place.look())
    place.put("picture001.txt", "another caption\n", age=OLD - 1)
    place.put("picture002.png", picture(9), age=OLD - 1)
    found = place.look()
    assert names(found) == ["picture001.png", "picture001.txt", "picture002.png", "picture002.txt"]
    assert found.new == 2


def test_empty_files_wait(place):
    """A file that was made and not yet written to is no caption and no image."""
    place.put("a.png", picture(1))
    place.put("a.txt", "")
    found = place.look()
    assert found.new == 0
    assert reasons(found)["a.txt"] == "is empty yet"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_a_stalled_upload_waits_an_hour(place, kind):
    """An image cut off waits while its upload may go on, then it is taken as it is."""
    name = f"a.{kind.lower()}"
    whole = picture(1, kind)
    place.put("a.txt", "a caption\n")
    place.put(name, whole)
    assert place.look().new == 1
    place.put(name, whole[: len(whole) // 2])
    found = place.look()
    assert found.new == 0
    assert "cut off" in reasons(found)[name]
    place.put(name, whole[: len(whole) // 2], age=3601)
    assert place.look().new == 1


def table(*rows):
    out = io.BytesIO()
    parquet.write_table(
        pa.table({"image": [r[0] for r in rows], "text": [r[1] for r in rows]}), out
    )
    return out.getvalue()


@pytest.mark.parametrize(
    ("source", "name", "data"),
    [
        ("tars", "a.tar", tar(1)),
        ("tars", "a.tgz", gzip.compress(tar(1))),
        ("parquet", "a.parquet", table((picture(1), "one"))),
    ],
)
def test_files_of_many_samples_are_taken_when_they_are_whole(place, source, name, data):
    """A tar or table cut off waits; whole, it is taken, and read as its source reads it."""
    config = dataclasses.replace(FOLDER, source=source)
    place.put(name, data[:-700])
    found = place.look(config)
    assert found.new == 0
    assert "cut off" in reasons(found)[name]
    place.put(name, data)
    found = place.look(config)
    assert found.new == 1
    (record,) = read_source(config, found.files)
    assert record.image == picture(1)


def test_a_table_of_paths_waits_for_its_images(place):
    """A parquet table that names files is taken when all of them are there."""
    config = dataclasses.replace(FOLDER, source="parquet")
    place.put("deep/a.parquet", table(("one.png", "one"), ("two.png", "two")))
    place.put("deep/one.png", picture(1))
    found = place.look(config)
    assert found.new == 0
    assert "such as two.png" in reasons(found)["deep/a.parquet"]
    place.put("deep/two.png", picture(2))
    found = place.look(config)
    assert found.new == 1
    assert len(list(read_source(config, found.files))) == 2
    nested = pa.table({"image": [{"bytes": None, "path": "absent.png"}], "text": ["three"]})
    out = io.BytesIO()
    parquet.write_table(nested.cast(pa.schema([
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("text", pa.string()),
    ])), out)  # fmt: skip
    place.put("b.parquet", out.getvalue())
    assert "absent.png" in reasons(place.look(config))["b.parquet"]


def test_lines_of_a_table_are_read_when_their_image_is_there(place):
    """A table that names all images of all times costs nothing but what is new in it."""
    place.put("one.png", picture(1))
    place.put("captions.csv", 'file,caption\none.png,"the first,\nin two lines"\ntwo.png,second\n')
    found = place.look()
    assert names(found) == ["captions.csv", "one.png"]
    assert "two.png" in reasons(found)["captions.csv:4"]
    (record,) = read_source(FOLDER, found.files)
    assert record.captions == ("the first,\nin two lines",)
    place.take(found)
    place.put("two.png", picture(2))
    place.put("three.png", picture(3))
    found = place.look()
    assert names(found) == ["captions.csv", "two.png"]
    (record,) = read_source(FOLDER, found.files)
    assert (record.key, record.captions) == ("two", ("second",))
    assert set(reasons(found)) == {"three.png"}


def test_the_last_line_of_a_table_may_be_half_written(place):
    """A last line without an end waits; a faulty one before it is told once, as a dead letter."""
    place.put("one.png", picture(1))
    whole = '{"file_name": "one.png", "text": "one"}\n'
    place.put("metadata.jsonl", whole + "nonsense\n" + '{"file_name": "tw')
    found = place.look()
    letter, record = read_source(FOLDER, found.files)
    assert (letter.key, record.key) == ("metadata.jsonl:2", "one")
    assert "not whole yet" in reasons(found)["metadata.jsonl:3"]
    found = place.look(known_faults={"metadata.jsonl:2"})
    assert [item.key for item in read_source(FOLDER, found.files)] == ["one"]


def test_a_table_that_is_being_written_keeps_its_images_waiting(place):
    """Images whose captions stand in a table that changes wait with it."""
    place.put("one.png", picture(1))
    place.put("captions.csv", "file,caption\none.png,one\n", age=0)
    rows = "file,caption\none.png,one\ntwo.png,two\n"
    found = place.look(meanwhile=lambda: place.put("captions.csv", rows, age=-1))
    assert found.new == 0
    assert set(reasons(found)) == {"one.png", "captions.csv"}


class Bucket:
    """Files of a server: whole as soon as they are there, with tags for stamps."""

    def __init__(self, path):
        self._files = LocalFolder(path)
        self.uri = "s3://bucket/landing"

    def __getattr__(self, name):
        return getattr(self._files, name)

    def walk(self, below=""):
        return (FileInfo(one.name, one.size, "tag") for one in self._files.walk(below))


def test_objects_of_a_server_are_whole(place):
    """Nothing is waited for there but the other half of a pair."""
    place.pair(1, age=0)
    place.put("cut.png", picture(2)[:300], age=0)
    place.put("cut.txt", "cut off where it came from\n", age=0)
    place.put("lonely.png", picture(3), age=0)
    look = Look(sleep=place.waits.append, clock=lambda: NOW)
    found = arrived(Bucket(place.path), FOLDER, Marks(), look)
    assert found.new == 2
    assert set(reasons(found)) == {"lonely.png"}
    assert place.waits == []


def test_a_landing_place_is_only_read(place):
    """What is handed to a source refuses to be written to; sent elsewhere it still reads."""
    place.pair(1)
    files = place.look().files
    for write in (
        files.prepare,
        lambda: files.write("a", b""),
        lambda: files.writing("a"),
        lambda: files.remove("picture001.png"),
    ):
        with pytest.raises(ValueError, match="never written to"):
            write()
    assert pickle.loads(pickle.dumps(files)).read("picture001.png") == picture(1)


def test_sources_that_cannot_grow_are_refused(place):
    """The text names those that can."""
    with pytest.raises(ValueError, match="folder, parquet, tars"):
        place.look(dataclasses.replace(FOLDER, source="cub"))


infos = st.builds(FileInfo, st.text(max_size=5), st.integers(0, 9), st.sampled_from(["1", "2"]))


@settings(max_examples=200, deadline=None)
@given(st.lists(infos), st.lists(infos), infos)
def test_marks_hold_just_the_files_that_were_taken(first, second, other):
    """Marks are a set of (name, size, stamp), through bytes and back."""
    marks = Marks(Marks().with_files(first).with_files(second).to_bytes())
    taken = {*first, *second}
    assert len(marks) == len(taken)
    assert all(info in marks for info in taken)
    assert (other in marks) == (other in taken)
    with pytest.raises(ValueError, match="16 bytes"):
        Marks(b"cut off")

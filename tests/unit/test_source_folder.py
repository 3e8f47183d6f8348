import io
import json
import os
import pickle
import tempfile

import pytest
from tiny_data import picture, tables, writing

from sdn.config import DataConfig
from sdn.data.files import FileInfo, LocalFolder
from sdn.data.images import encode
from sdn.data.preparation import Prepared, prepare
from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.shards import write_dataset
from sdn.data.sources import PARTITION_RECORDS, open_source, partitions, read_source


def config(folder, **changes):
    return DataConfig(source="folder", path=str(folder), resolution=32, **changes)


def image(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(picture(number), "png"))
    return path


def captioned(path, captions="a thing\n", number=0):
    image(path, number).with_suffix(".txt").write_text(captions, encoding="utf-8")


def metadata(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def items(folder, kind=Record, **changes):
    return [item for item in read_source(config(folder, **changes)) if isinstance(item, kind)]


def only(folder, kind=Record, **changes):
    (item,) = items(folder, kind, **changes)
    return item


def by_key(folder, **changes):
    return {record.key: record for record in items(folder, **changes)}


def failure(folder):
    with pytest.raises(ValueError, match=r".") as raised:
        list(read_source(config(folder)))
    return str(raised.value)


def test_text_file_beside_an_image_holds_a_caption_a_line(tmp_path):
    """Each line is a caption, stripped; blank lines, line ends of Windows and a mark are not."""
    image(tmp_path / "birds" / "red.png")
    (tmp_path / "birds" / "red.txt").write_bytes(
        "\ufeffa red bird\r\n\r\n  ein roter Vogel, größer \r\n".encode()
    )
    record = only(tmp_path)
    assert record.key == "birds-red"
    assert record.captions == ("a red bird", "ein roter Vogel, größer")
    assert record.image == (tmp_path / "birds" / "red.png").read_bytes()
    assert record.labels == {}


def test_metadata_gives_captions_and_labels(tmp_path):
    """Texts or lists under text and caption are captions, other texts are labels, numbers not."""
    image(tmp_path / "a.png")
    image(tmp_path / "deep" / "b.png", 1)
    image(tmp_path / "deep" / "er" / "c.png", 2)
    metadata(tmp_path, {"file_name": "a.png", "text": "an a", "kind": "letter", "width": 32})
    metadata(
        tmp_path / "deep",
        {"file_name": "b.png", "caption": ["a b", "", "one more b"]},
        "",
        {"file_name": "er/c.png", "text": "first", "caption": "second"},
    )
    read = by_key(tmp_path)
    assert read["a"].captions == ("an a",)
    assert read["a"].labels == {"kind": "letter"}
    assert read["deep-b"].captions == ("a b", "one more b")
    assert read["deep-er-c"].captions == ("first", "second")


def test_metadata_comes_before_the_text_file(tmp_path):
    """An image that has both takes the captions of metadata.jsonl, or else those of its text."""
    captioned(tmp_path / "both.png", "from the text file")
    captioned(tmp_path / "labelled.png", "from the text file", 1)
    metadata(
        tmp_path,
        {"file_name": "both.png", "text": "from the metadata"},
        {"file_name": "labelled.png", "colour": "red"},
    )
    read = by_key(tmp_path)
    assert read["both"].captions == ("from the metadata",)
    assert read["labelled"].captions == ("from the text file",)
    assert read["labelled"].labels == {"colour": "red"}


def test_lines_of_one_image_are_joined_if_they_agree(tmp_path):
    """Two lines give two captions; a line with another split is refused and counted."""
    image(tmp_path / "a.png")
    line = {"file_name": "a.png", "split": "test"}
    metadata(
        tmp_path,
        line | {"text": "one"},
        line | {"text": "two"},
        line | {"text": "three", "split": "train"},
    )
    assert only(tmp_path).captions == ("one", "two")
    dead = only(tmp_path, DeadLetter)
    assert dead.where == "metadata.jsonl:3"
    assert "another split" in dead.reason


def test_split_of_the_field_comes_before_that_of_the_folder(tmp_path):
    """The field split, then the folder at the top; a folder further down says nothing."""
    for number, name in enumerate(("train", "val", "validation", "test")):
        captioned(tmp_path / name / "x.png", number=number)
    captioned(tmp_path / "other" / "test" / "x.png", number=9)
    image(tmp_path / "test" / "moved.png", 10)
    metadata(tmp_path / "test", {"file_name": "moved.png", "text": "moved", "split": "val"})
    splits = {
        key: record.split
        for key, record in by_key(tmp_path, validation_share=0, test_share=0).items()
    }
    assert splits == {
        "train-x": "train",
        "val-x": "validation",
        "validation-x": "validation",
        "test-x": "test",
        "other-test-x": "train",
        "test-moved": "validation",
    }


def test_validation_is_drawn_from_a_folder_named_train_where_asked(tmp_path):
    """And from no other."""
    for number in range(60):
        captioned(tmp_path / ("test" if number % 2 else "train") / f"{number}.png", number=number)
    assert {record.split for record in items(tmp_path)} == {"train", "test"}
    drawn = items(tmp_path, validation_share=0.4, validation_from_train=True)
    splits = [record.split for record in drawn]
    assert splits.count("test") == 30
    assert splits.count("train") > splits.count("validation") > 0


def test_drawn_splits_have_the_configured_shares(tmp_path):
    """Without declared splits each image is drawn; the shares come out about as configured."""
    for number in range(300):
        captioned(tmp_path / f"{number}.png", number=number)
    splits = [record.split for record in items(tmp_path, validation_share=0.2, test_share=0.3)]
    assert len(splits) == 300
    assert 40 <= splits.count("validation") <= 80
    assert 65 <= splits.count("test") <= 115
    assert {r.split for r in items(tmp_path, validation_share=0, test_share=0)} == {"train"}


def test_equal_files_share_a_split_whatever_their_names(tmp_path):
    """Copies of one file under many names are all drawn into the same split."""
    for number in range(20):
        for copy in range(4):
            captioned(tmp_path / f"{copy}" / f"{number}.png", number=number)
    splits = {}
    for record in items(tmp_path, validation_share=0.3, test_share=0.3):
        splits.setdefault(record.image, set()).add(record.split)
    assert len(splits) == 20
    assert all(len(found) == 1 for found in splits.values())
    assert len(set.union(*splits.values())) == 3


def test_image_without_caption_is_a_dead_letter(tmp_path):
    """No text file, an empty one, or a line without text: each with its own reason."""
    captioned(tmp_path / "good.png")
    image(tmp_path / "alone.png", 1)
    captioned(tmp_path / "empty.png", " \n\n", 2)
    image(tmp_path / "silent.png", 3)
    metadata(tmp_path, {"file_name": "silent.png", "text": ""})
    reasons = {dead.key: dead.reason for dead in items(tmp_path, DeadLetter)}
    assert set(reasons) == {"alone", "empty", "silent"}
    assert "expected alone.txt beside it or a line in a metadata.jsonl" in reasons["alone"]
    assert "empty.txt holds no caption" in reasons["empty"]
    assert "neither text nor caption" in reasons["silent"]
    assert only(tmp_path).key == "good"


def test_text_that_is_not_utf8_is_a_dead_letter(tmp_path):
    """The reason names the text file, the byte, and what to do."""
    captioned(tmp_path / "good.png")
    image(tmp_path / "latin.png", 1).with_suffix(".txt").write_bytes("größer".encode("latin-1"))
    dead = only(tmp_path, DeadLetter)
    assert dead.key == "latin"
    assert dead.where == "latin.png"
    assert dead.reason == "latin.txt must be UTF-8, but its byte 2 is not; save it as UTF-8"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"file_name": "a.png", "text": ', "not JSON"),
        ("[1, 2]", "expected a JSON object, not list"),
        ('{"text": "no name"}', "file_name must name the image, not None"),
        ('{"file_name": 7, "text": "x"}', "file_name must name the image, not 7"),
        ('{"file_name": "gone.png", "text": "x"}', "there is no file sub/gone.png"),
        ('{"file_name": "../../a.png", "text": "x"}', "a path inside the folder"),
        ('{"file_name": "/etc/hostname", "text": "x"}', "a path inside the folder"),
        ('{"file_name": "good.png", "text": 7}', "text must be a text or a list of texts, not 7"),
        ('{"file_name": "good.png", "text": ["x", null]}', "text must be a text or a list"),
        ('{"file_name": "good.png", "text": "x", "split": "dev"}', "split must be one of train"),
        ("[" * 5000, "not JSON"),
    ],
)
def test_unusable_line_is_a_dead_letter_that_names_file_and_line(tmp_path, line, reason):
    """Whatever is wrong with a line, the others count, and the reason says where to look."""
    image(tmp_path / "sub" / "good.png")
    metadata(tmp_path / "sub", {"file_name": "good.png", "text": "good"}, "", line)
    assert only(tmp_path).captions == ("good",)
    dead = only(tmp_path, DeadLetter)
    assert dead.where == "sub/metadata.jsonl:3"
    assert dead.reason.startswith("sub/metadata.jsonl line 3: ")
    assert reason in dead.reason


def test_line_that_is_not_utf8_is_a_dead_letter(tmp_path):
    """One line in another encoding costs that line only."""
    image(tmp_path / "a.png")
    image(tmp_path / "b.png", 1)
    good = json.dumps({"file_name": "a.png", "text": "good"}).encode()
    bad = '{"file_name": "b.png", "text": "größer"}'.encode("latin-1")
    (tmp_path / "metadata.jsonl").write_bytes(bad + b"\n" + good)
    reasons = [dead.reason for dead in items(tmp_path, DeadLetter)]
    assert only(tmp_path).key == "a"
    assert len(reasons) == 2  # the line, and the image that is without a caption now
    assert reasons[0].startswith("metadata.jsonl line 1: must be UTF-8")


def test_keys_are_safe_in_tars_and_unique(tmp_path):
    """Blanks, dots, slashes, long paths, a leading `__` and clashes all end as keys that prepare
    accepts, and no two are equal."""
    paths = [
        "a/b.png", "a-b.png", "two words.png", "two_words.png", "v1.2.png", "same.png", "same.jpg",
        "__hidden__.png", "__/__.png", "日本/鳥.png", f"{'long' * 20}/{'name' * 20}.png",
        f"other/{'long' * 20}/{'name' * 20}.png", f"{'鳥' * 60}.png", "tab\tname.png",
    ]  # fmt: skip
    for number, path in enumerate(paths):
        captioned(tmp_path / path, number=number)
    records = items(tmp_path)
    assert len({record.key for record in records}) == len(paths)
    assert all(isinstance(prepare(record, config(tmp_path)), Prepared) for record in records)
    assert {"v1_2", "日本-鳥", "tab_name"} <= {record.key for record in records}
    clashes = sorted(record.key for record in records if record.key.startswith("two_words"))
    assert len(clashes) == 2
    assert all(len(key) == len("two_words-") + 16 for key in clashes)


def test_key_does_not_depend_on_other_files_without_a_clash(tmp_path):
    """More images leave the keys of the earlier ones as they are."""
    for number in range(5):
        captioned(tmp_path / f"{number}.png", number=number)
    before = by_key(tmp_path)
    for number in range(5, 9):
        captioned(tmp_path / "more" / f"{number}.png", number=number)
    after = by_key(tmp_path)
    assert set(before) < set(after)
    assert all(after[key] == record for key, record in before.items())


def test_two_reads_are_equal(tmp_path):
    """The same folder gives the same items in the same order."""
    for number in range(12):
        captioned(tmp_path / f"{number % 3}" / f"{number}.png", number=number)
    assert items(tmp_path, object) == items(tmp_path, object)


def test_beginning_draws_from_every_folder(tmp_path):
    """The first images come from all over, so that a limit takes some of every split."""
    for name in ("test", "train", "validation"):
        for number in range(30):
            captioned(tmp_path / name / f"{number}.png", number=number)
    assert {record.split for record in items(tmp_path)[:20]} == {"train", "validation", "test"}


def test_images_are_read_one_at_a_time(tmp_path):
    """An image is opened only when its record is asked for."""
    for number in range(3):
        captioned(tmp_path / f"{number}.png", number=number)
    reader = read_source(config(tmp_path))
    first = next(reader)
    for number in range(3):
        (tmp_path / f"{number}.png").unlink()
    assert isinstance(first, Record)
    rest = list(reader)
    assert [type(item) for item in rest] == [DeadLetter, DeadLetter]
    assert all("cannot be read: No such file" in item.reason for item in rest)


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path):
    """A text without image and foreign files are exclusions; names beginning with a dot are not."""
    captioned(tmp_path / "a.PNG")
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "notes.md").write_text("more")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    image(tmp_path / ".cache" / "b.png")
    reasons = {item.key: item.reason for item in items(tmp_path, Exclusion)}
    assert reasons == {
        "README.txt": "text file without an image of its name",
        "notes.md": "not taken for an image (.md)",
    }
    assert only(tmp_path).key == "a"
    assert items(tmp_path, DeadLetter) == []


def test_metadata_may_name_images_with_other_extensions(tmp_path):
    """A file that a line names is taken for an image, whatever it is called."""
    image(tmp_path / "picture.bin")
    metadata(tmp_path, {"file_name": "./picture.bin", "text": "a picture"})
    assert only(tmp_path).captions == ("a picture",)
    assert items(tmp_path, Exclusion) == []


def test_linked_folders_are_read_once(tmp_path):
    """Links are followed; one that leads back into itself does not read for ever."""
    captioned(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(root)
    assert only(root).key == "link-a"


def test_folder_must_be_named():
    """Without data.path the error says how to set it."""
    with pytest.raises(ValueError, match=r"data\.path is not set.*--set data\.path=FOLDER"):
        partitions(DataConfig(source="folder"))


def test_folder_must_exist(tmp_path):
    """A path that is missing or a file is refused with the expected layout."""
    assert f"{tmp_path / 'none'} is nothing; expected images" in failure(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"")
    assert f"{tmp_path / 'file'} is a file; expected images" in failure(tmp_path / "file")


def test_folder_without_images_is_refused_with_what_was_found(tmp_path):
    """The error counts what lies there instead and says what was expected."""
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "b.heic").write_bytes(b"x")
    text = failure(tmp_path)
    assert f"no image in {tmp_path}" in text
    assert "found 0 images, 1 text files, 1 .heic" in text
    assert "expected images (.png, .jpg" in text
    assert '{"file_name": "bird.jpg"' in text


def test_folder_without_a_single_caption_is_refused_with_the_first_reason(tmp_path):
    """Images alone are not enough: the error counts them and gives the reason of the first."""
    image(tmp_path / "a.png")
    metadata(tmp_path, "broken")
    text = failure(tmp_path)
    assert f"no image with a caption in {tmp_path}" in text
    assert "found 1 images, 0 text files, 1 unusable lines" in text
    assert "a.png: no caption: expected a.txt" in text


def test_folder_becomes_a_data_set(tmp_path):
    """A read folder is written as shards, dead letters within the budget and exclusions counted."""
    for number in range(8):
        captioned(tmp_path / "in" / "train" / f"{number}.png", f"number {number}", number)
    image(tmp_path / "in" / "test" / "alone.png", 9)
    (tmp_path / "in" / "LICENSE").write_text("free")
    settings = config(tmp_path / "in", failure_budget=0.2)
    manifest = write_dataset(
        partitions(settings), LocalFolder(tmp_path / "out"), writing(settings, attribution=None)
    )
    assert manifest.dead_letters == 1
    assert manifest.exclusions == {"not taken for an image (no extension)": 1}
    assert sum(tables(tmp_path / "out")["train"]) == 8


def table(folder, text, name="captions.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def test_csv_gives_captions_splits_and_labels(tmp_path):
    """A row has a caption; rows of one file are its captions; texts are labels, numbers not."""
    image(tmp_path / "deep" / "a.png")
    image(tmp_path / "deep" / "b.png", 1)
    table(
        tmp_path / "deep",
        "\ufefffile_name,caption,split,kind,comment_number\r\n"
        'a.png,"a bird, red",test,bird,0\r\n'
        "\r\n"
        'a.png,"two\r\nlines",test,bird,1\r\n'
        "b.png,ein größerer Vogel,,,0\r\n",
    )
    read = by_key(tmp_path, validation_share=0, test_share=0)
    assert read["deep-a"].captions == ("a bird, red", "two\r\nlines")
    assert read["deep-a"].labels == {"kind": "bird"}
    assert read["deep-a"].split == "test"
    assert read["deep-b"].captions == ("ein größerer Vogel",)
    assert (read["deep-b"].labels, read["deep-b"].split) == ({}, "train")
    assert items(tmp_path, DeadLetter) == items(tmp_path, Exclusion) == []


@pytest.mark.parametrize("image_column", ["file_name", "file", "Image", "filename", "path"])
@pytest.mark.parametrize("caption_column", ["caption", " Text", "title"])
def test_usual_names_of_columns_are_known(tmp_path, image_column, caption_column):
    """Whatever the usual name, case and blanks about it, the column is found."""
    image(tmp_path / "a.png")
    table(tmp_path, f"number,{caption_column},{image_column}\n1,an a,./a.png\n")
    assert only(tmp_path).captions == ("an a",)
    assert only(tmp_path).labels == {}


def test_tsv_is_parted_by_tabs(tmp_path):
    """captions.tsv is read as captions.csv is; commas are part of its texts."""
    image(tmp_path / "a.png")
    table(tmp_path, "file\ttext\na.png\tone, two\n", "captions.tsv")
    assert only(tmp_path).captions == ("one, two",)


def test_configured_fields_come_before_the_usual_names(tmp_path):
    """image_field and caption_field name columns and fields; usual ones are no labels then."""
    image(tmp_path / "a.png")
    image(tmp_path / "b.png", 1)
    table(tmp_path, "file_name,where,caption,long\nno.png,a.png,short,a longer one\n")
    metadata(tmp_path, {"where": "b.png", "text": "short", "long": ["b longer", "b more"]})
    read = by_key(tmp_path, image_field="where", caption_field="long")
    assert read["a"].captions == ("a longer one",)
    assert read["b"].captions == ("b longer", "b more")
    assert read["a"].labels == {"file_name": "no.png"}
    assert read["b"].labels == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "[]"),
        ("a.png,a bird\n", "['a.png', 'a bird']"),
        ("file_name;caption\na.png;a\n", "['file_name;caption']"),
        ("file_name,words\na.png,a\n", "['file_name', 'words']"),
    ],
)
def test_header_without_the_columns_is_refused(tmp_path, text, found):
    """The error comes from the call itself and says what was expected and what was found."""
    image(tmp_path / "a.png")
    table(tmp_path / "sub", text)
    with pytest.raises(ValueError, match=r"sub/captions\.csv must begin") as raised:
        partitions(config(tmp_path))
    assert f"found {found}" in str(raised.value)
    assert "expected one of file_name, file, image, filename, path" in str(raised.value)
    assert "one of caption, text, title" in str(raised.value)


def test_header_without_a_configured_column_is_refused(tmp_path):
    """A configured name is not replaced by a usual one."""
    captioned(tmp_path / "a.png")
    table(tmp_path, "file,caption\na.png,a\n")
    with pytest.raises(ValueError, match=r"one of words \(the caption\)"):
        partitions(config(tmp_path, caption_field="words"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"gone.png,x,", "there is no file sub/gone.png"),
        (b"../../a.png,x,", "file must be a path inside the folder"),
        (b"/etc/hostname,x,", "file must be a path inside the folder"),
        (b",x,", "file must name the image, not ''"),
        (b"good.png,x", "expected 3 columns, got 2"),
        (b"good.png,x,dev", "split must be one of train"),
        (b"good.png,x,test", "another split"),
        ("good.png,größer,".encode("latin-1"), "must be UTF-8"),
        (b'good.png,"x"y,', "not a row of columns"),
        (b'good.png,"x,', "not a row of columns: unexpected end of data"),
        (b"good.png," + b"x" * 200_000 + b",", "field larger than field limit"),
    ],
)
def test_unusable_row_is_a_dead_letter_that_names_file_and_line(tmp_path, row, reason):
    """Whatever is wrong with a row, the others count, and the reason says where to look."""
    image(tmp_path / "sub" / "good.png")
    table(tmp_path / "sub", b"file,text,split\ngood.png,good,\n\n" + row)
    assert only(tmp_path).captions == ("good",)
    dead = only(tmp_path, DeadLetter)
    assert dead.where == "sub/captions.csv:4"
    assert dead.reason.startswith("sub/captions.csv line 4: ")
    assert reason in dead.reason


def test_faults_in_the_layout_show_before_the_first_partition(tmp_path):
    """The call itself refuses an unfit folder, not the first look at its result."""
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="expected images"):
            partitions(config(folder))
    image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no image with a caption"):
        partitions(config(tmp_path))


def test_partitions_can_be_sent_and_read_again(tmp_path):
    """A pickled partition gives the same items, any number of times; each has its share."""
    data = encode(picture(0), "png")
    for number in range(2 * PARTITION_RECORDS + 1):
        (tmp_path / f"{number}.png").write_bytes(data)
        (tmp_path / f"{number}.txt").write_text("a thing")
    (tmp_path / "notes.md").write_text("more")
    metadata(tmp_path, "broken")
    pieces = list(partitions(config(tmp_path)))
    full = PARTITION_RECORDS
    assert [len(list(piece.items())) for piece in pieces] == [1, full, full, 1, 1]
    for piece in pieces:
        copy = pickle.loads(pickle.dumps(piece))
        assert list(copy.items()) == list(copy.items()) == list(piece.items())


def test_listing_leaves_nothing_behind(tmp_path, monkeypatch):
    """The temporary folder of a listing goes when the source was read, given up, or refused."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    captioned(tmp_path / "in" / "a.png")
    list(partitions(config(tmp_path / "in")))
    assert list(scratch.iterdir()) == []
    given_up = partitions(config(tmp_path / "in"))
    next(given_up)
    given_up.close()
    assert list(scratch.iterdir()) == []
    table(tmp_path / "in", "no header\n")
    with pytest.raises(ValueError, match="must begin"):
        partitions(config(tmp_path / "in"))
    assert list(scratch.iterdir()) == []


def test_dead_letter_keeps_the_image_and_names_its_file(tmp_path):
    """Records and dead letters say where they come from; a second try finds the image."""
    captioned(tmp_path / "sub" / "good.png")
    alone = image(tmp_path / "sub" / "alone.png", 1)
    assert only(tmp_path).where == "sub/good.png"
    dead = only(tmp_path, DeadLetter)
    assert (dead.where, dead.image) == ("sub/alone.png", alone.read_bytes())


def test_names_that_are_not_utf8_are_read(tmp_path):
    """Such a name becomes a key and a place that can be printed."""
    name = os.fsdecode(b"gr\xfcn.png")
    try:
        captioned(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    record = only(tmp_path)
    assert record.where == "gr\\xfcn.png" or record.where.isprintable()
    record.where.encode()
    assert isinstance(prepare(record, config(tmp_path)), Prepared)


def test_text_files_of_either_case_are_one(tmp_path):
    """A text with a loud extension is found; of two, the quiet one counts."""
    image(tmp_path / "a.png").with_suffix(".TXT").write_text("loud")
    assert only(tmp_path).captions == ("loud",)
    (tmp_path / "a.txt").write_text("quiet")
    assert only(tmp_path).captions == ("quiet",)
    assert only(tmp_path, Exclusion).reason == "not taken for an image (.txt)"


class Bucket:
    """A place in memory, as s3:// is one: no folders, no links, errors without errno."""

    uri = "s3://bucket/prefix"

    def __init__(self, contents):
        self.contents = contents

    def walk(self, below=""):
        for name, data in self.contents.items():
            if name.startswith(f"{below}/" if below else ""):
                yield FileInfo(name, len(data), "tag")

    def exists(self, name):
        return name in self.contents

    def read(self, name):
        if name == "locked.png":
            raise OSError("access denied")
        return self.contents[name]

    def open(self, name):
        return io.BytesIO(self.contents[name])


def test_bucket_is_read_through_its_files(tmp_path):
    """Nothing but the files given is asked for: a bucket gives the items that a folder gives."""
    captioned(tmp_path / "train" / "a.png", "an a")
    image(tmp_path / "b.png", 1)
    image(tmp_path / "c.png", 2)
    image(tmp_path / "alone.png", 3)
    metadata(tmp_path, {"file_name": "b.png", "text": "a b"}, {"file_name": "no.png"})
    table(tmp_path, "file,caption\nc.png,a c\nmissing.png,x\n")
    (tmp_path / "notes.md").write_text("x")
    folder = open_source(config(tmp_path))
    bucket = Bucket({about.name: folder.read(about.name) for about in folder.walk()})
    settings = DataConfig(source="folder", path=bucket.uri, resolution=32)
    found = list(read_source(settings, bucket))
    assert found == items(tmp_path, object)
    assert sorted(item.key for item in found if isinstance(item, Record)) == ["b", "c", "train-a"]
    assert sum(isinstance(item, DeadLetter) for item in found) == 3


def test_unreadable_object_is_a_dead_letter():
    """One image that the place does not give costs that image only."""
    data = encode(picture(0), "png")
    bucket = Bucket({"a.png": data, "locked.png": data, "a.txt": b"x", "locked.txt": b"x"})
    settings = DataConfig(source="folder", path=bucket.uri, resolution=32)
    dead = [item for item in read_source(settings, bucket) if isinstance(item, DeadLetter)]
    assert [(item.key, item.image) for item in dead] == [("locked", None)]
    assert dead[0].reason == "the image cannot be read: access denied"

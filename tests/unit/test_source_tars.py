import gzip
import io
import itertools
import json
import pickle
import random
import tarfile
import tracemalloc
from collections import Counter

import pytest
from tiny_data import picture

from sdn.config import DataConfig
from sdn.data.files import LocalFolder
from sdn.data.images import encode
from sdn.data.preparation import Prepared, prepare
from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources import partitions, read_source, tars_members, tars_refusals, tars_samples
from sdn.data.sources.tars_members import DamagedTarError, Members


def png(number=0):
    return encode(picture(number), "png")


def archive(members, kind=tarfile.USTAR_FORMAT):
    """The bytes of a tar of (name or TarInfo, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sample(key, number=0, **parts):
    """The members of a sample: a PNG, a text, and others."""
    parts = {"png": png(number), "txt": f"number {number}".encode()} | parts
    return [(f"{key}.{name}", content) for name, content in parts.items() if content is not None]


def put(root, name, *members, **options):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(archive(itertools.chain(*members), **options))
    return path


def config(root, **changes):
    return DataConfig(source="tars", path=str(root), resolution=32, **changes)


def items(root, kind=Record, **changes):
    return [item for item in read_source(config(root, **changes)) if isinstance(item, kind)]


def only(root, kind=Record, **changes):
    (item,) = items(root, kind, **changes)
    return item


def about(**values):
    return json.dumps(values).encode()


def test_samples_become_records(tmp_path):
    """A sample gives its image, captions a line, split, and a key and a place with the tar's."""
    put(tmp_path, "train-000.tar", sample("a"), sample("b", 1, txt=b"one\r\n\n two \n"))
    records = {record.key: record for record in items(tmp_path)}
    assert list(records) == ["train-000-a", "train-000-b"]
    record = records["train-000-b"]
    assert record.image == png(1)
    assert record.captions == ("one", "two")
    assert record.split == "train"
    assert record.labels == {}
    assert record.where == "train-000.tar:b"


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.TAR"])
def test_packed_tars_are_read(tmp_path, name):
    """By their content, whatever the name says; keys do not have the extension."""
    content = archive([*sample("x"), *sample("y", 1)])
    (tmp_path / name).write_bytes(gzip.compress(content) if "gz" in name else content)
    assert [record.key for record in items(tmp_path)] == ["a-x", "a-y"]


@pytest.mark.parametrize("extension", [*tars_samples.IMAGES, "JPG", "Png"])
def test_kinds_of_images(tmp_path, extension):
    """Every kind that can be decoded, in either case."""
    put(tmp_path, "a.tar", sample("x", **{"png": None, extension: png()}))
    assert only(tmp_path).image == png()


def test_captions_come_from_the_text_before_the_json(tmp_path):
    """.txt, else .caption, else the JSON's caption, text or captions."""
    listed = about(caption="from json")
    put(
        tmp_path,
        "a.tar",
        sample("a", json=listed, caption=b"from caption"),
        sample("b", json=listed, caption=b"from caption", txt=None),
        sample("c", json=listed, txt=None),
        sample("d", json=about(text="from text"), txt=None),
        sample("e", json=about(caption=None, captions=["one", "two"]), txt=None),
    )
    captions = {record.key: record.captions for record in items(tmp_path)}
    assert captions == {
        "a-a": ("number 0",), "a-b": ("from caption",), "a-c": ("from json",),
        "a-d": ("from text",), "a-e": ("one", "two"),
    }  # fmt: skip


def test_caption_field_is_the_only_one_where_configured(tmp_path):
    """The named field goes before the text; a sample without it is a dead letter."""
    put(tmp_path, "a.tar", sample("a", json=about(alt="named")), sample("b"))
    assert only(tmp_path, caption_field="alt").captions == ("named",)
    assert "its json's field alt" in only(tmp_path, DeadLetter, caption_field="alt").reason


def test_samples_without_a_caption_are_dead_letters(tmp_path):
    """They keep the image for a second try."""
    put(
        tmp_path,
        "a.tar",
        sample("a", txt=b" \n"),
        sample("b", txt=None),
        sample("c", txt=b"\xff\xfe"),
        sample("d", txt=None, json=b"{"),
        sample("e", txt=None, json=b"[1]"),
        sample("f", txt=None, json=about(caption=3)),
        sample("g", json=b"[" * 100_000),
    )
    letters = {letter.key: letter for letter in items(tmp_path, DeadLetter)}
    assert {letter.image for letter in letters.values()} == {png()}
    assert "holds no caption" in letters["a-a"].reason
    assert "expected a .txt, a .caption or a .json" in letters["a-b"].reason
    assert "must be UTF-8" in letters["a-c"].reason
    assert "cannot be read" in letters["a-d"].reason
    assert "must be an object" in letters["a-e"].reason
    assert "must be a text" in letters["a-f"].reason
    assert len(letters) == 7


def test_labels(tmp_path):
    """Texts label* and class* and the object labels of the JSON, and .cls."""
    values = about(label="red", class_name="bird", labels={"n": 3, "x": "y", "no": None}, url="u")
    put(tmp_path, "a.tar", sample("a", json=values, cls=b"7\n"), sample("b", cls=b"\xff"))
    expected = {"label": "red", "class_name": "bird", "n": "3", "x": "y", "cls": "7"}
    assert only(tmp_path).labels == expected
    assert only(tmp_path, DeadLetter).key == "a-b"


def test_our_own_shards_give_everything_back(tmp_path):
    """All captions and labels, splits as they were; the other files of the folder are left out."""
    for split in ("train", "test"):
        named = [f"picture {split}", "again", "the 3rd"]
        parts = {"json": about(captions=named, labels={"parity": "odd"}), "txt": named[0].encode()}
        put(tmp_path, f"{split}-000000.tar", sample("item-3", **parts))
        (tmp_path / f"{split}-000000.parquet").write_bytes(b"PAR1")
    (tmp_path / "manifest.json").write_text("{}")
    records = items(tmp_path)
    assert {record.split for record in records} == {"train", "test"}
    record = next(record for record in records if record.key == "test-000000-item-3")
    assert record.captions == ("picture test", "again", "the 3rd")
    assert record.labels == {"parity": "odd"}
    assert {item.reason for item in items(tmp_path, Exclusion)} == {"a file that is no tar"}
    assert not items(tmp_path, DeadLetter)


def test_output_of_img2dataset(tmp_path):
    """Captions are the .txt's; table and statistics beside the tar are left out."""
    notes = about(caption="number 0", url="http://example.org/a.jpg", status="success", width=32)
    put(tmp_path, "00000.tar", sample("000000003", png=None, jpg=png(), json=notes))
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    record = only(tmp_path)
    assert (record.key, record.captions, record.labels) == ("00000-000000003", ("number 0",), {})
    assert len(items(tmp_path, Exclusion)) == 2


def test_split_comes_from_the_name_then_the_json_then_the_hash(tmp_path):
    """As in the order of the words; an unknown split is a dead letter."""
    test, odd = about(split="test"), about(split="odd")
    put(tmp_path, "val/0.tar", sample("a", json=test))
    put(tmp_path, "0.tar", sample("a", json=test), sample("b", json=odd))
    put(tmp_path, "1.tar", *[sample(f"{n}", n) for n in range(30)])
    records = items(tmp_path, validation_share=0.3, test_share=0.3)
    splits = {record.key: record.split for record in records}
    assert splits["val-0-a"] == "validation"
    assert splits["0-a"] == "test"
    drawn = {split for key, split in splits.items() if key.startswith("1-")}
    assert drawn == {"train", "validation", "test"}
    assert "split must be one of" in only(tmp_path, DeadLetter).reason


def test_validation_is_drawn_from_what_is_to_train_where_asked(tmp_path):
    """From tars and samples of which a name says so, and from no other."""
    put(tmp_path, "train/0.tar", *[sample(f"{n}", n) for n in range(30)])
    put(tmp_path, "0.tar", *[sample(f"{n}", n, json=about(split="test")) for n in range(30)])
    assert Counter(r.split for r in items(tmp_path)) == {"train": 30, "test": 30}
    drawn = items(tmp_path, validation_share=0.3, validation_from_train=True)
    splits = Counter(record.split for record in drawn)
    assert splits["test"] == 30
    assert splits["train"] > splits["validation"] > 0


def test_key_is_the_name_up_to_the_first_dot(tmp_path):
    """WebDataset's rule: folders are kept, further dots belong to the extension."""
    put(
        tmp_path,
        "x.tar",
        sample("./a"),
        [("b/c.png", png(1)), ("b/c.seg.png", b"mask"), ("b/c.txt", b"one")],
        [("b.old/c.png", png(2)), ("b.old/c.txt", b"two")],
    )
    assert {r.where: r.image for r in items(tmp_path)} == {
        "x.tar:a": png(0), "x.tar:b/c": png(1), "x.tar:b.old/c": png(2),
    }  # fmt: skip
    assert only(tmp_path, Exclusion).reason == "a member that is no part of a sample"


def test_keys_are_unique_and_fit_for_a_tar(tmp_path):
    """Whatever tars and samples are called; and a key says nothing about the other samples."""
    names = ["a-b", "a/b", "a_b", "a b", "ö", "l" * 95, "k" * 95, "m/" * 50 + "x", "__x", "c"]
    tars = ["a.tar", "a-a.tar", "a/a.tar", "a_a.tar", "a.b.tar", f"{'ü' * 100}.tar"]
    for tar in tars:
        put(tmp_path, tar, *[sample(name, n) for n, name in enumerate(names)],
            kind=tarfile.PAX_FORMAT)  # fmt: skip
    records = items(tmp_path)
    assert len({record.key for record in records}) == len(tars) * len(names)
    assert all(isinstance(prepare(record, config(tmp_path)), Prepared) for record in records)
    before = {record.where: record.key for record in records}
    put(tmp_path, "a.tar", sample("c"))
    after = {record.where: record.key for record in items(tmp_path)}
    assert after.items() <= before.items()


def test_tars_with_one_beginning_do_not_share_keys(tmp_path):
    """`a` with the sample `b-c`, and `a-b` with the sample `c`."""
    put(tmp_path, "a.tar", sample("b-c"))
    put(tmp_path, "a-b.tar", sample("c"))
    assert len({record.key for record in items(tmp_path)}) == 2


def test_second_sample_of_a_key_is_a_dead_letter(tmp_path):
    """At once or later in the tar; the first is used."""
    put(tmp_path, "x.tar", sample("a", 0), sample("a", 1), sample("b", 2), sample("a", 3))
    assert [record.image for record in items(tmp_path)] == [png(0), png(2)]
    letters = items(tmp_path, DeadLetter)
    assert [letter.image for letter in letters] == [png(1), png(3)]
    assert all("the same key, 'a'" in letter.reason for letter in letters)


def test_sample_has_one_image(tmp_path):
    """None, an empty one, or two are dead letters."""
    put(tmp_path, "x.tar", sample("a", png=None), sample("b", jpg=png()), sample("c", png=b""))
    letters = {letter.key: letter.reason for letter in items(tmp_path, DeadLetter)}
    assert letters["x-a"] == "no image; it has txt"
    assert letters["x-b"] == "2 images: png, jpg"
    assert letters["x-c"] == "no image; it has png, txt"


def hostile(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (hostile("e.png", tarfile.SYMTYPE, "/etc/passwd"), "a symbolic link to '/etc/passwd'"),
        (hostile("e.png", tarfile.LNKTYPE, "a.png"), "a hard link to 'a.png'"),
        (hostile("e.png", tarfile.CHRTYPE), "a device"),
        (hostile("e.png", tarfile.BLKTYPE), "a device"),
        (hostile("e.png", tarfile.FIFOTYPE), "a fifo"),
        (hostile("e.png", tarfile.GNUTYPE_SPARSE), "a sparse file"),
        (hostile("e.png", b"Z"), "unknown type b'Z'"),
        (hostile("/e.png"), "out of the archive's folder"),
        (hostile("../e.png"), "out of the archive's folder"),
        (hostile("e/../../e.png"), "out of the archive's folder"),
        (hostile("e\\..\\..\\e.png"), "out of the archive's folder"),
        (hostile("\\e.png"), "out of the archive's folder"),
        (hostile("C:e.png"), "out of the archive's folder"),
        (hostile("e\n.png"), "control characters"),
        (hostile("e\x1b[2J.png"), "control characters"),
        (hostile("../", tarfile.DIRTYPE), "out of the archive's folder"),
    ],
)
def test_hostile_members_are_refused(tmp_path, member, reason):
    """Each is a dead letter that names it; the samples around it are read."""
    (tmp_path / "x.tar").write_bytes(archive([*sample("a"), (member, b""), *sample("z", 1)]))
    letter = only(tmp_path, DeadLetter)
    assert reason in letter.reason
    assert repr(member.name.rstrip("/"))[1:-1] in letter.reason
    assert letter.where == f"x.tar:{member.name.rstrip('/')}" or member.name == "../"
    assert [record.image for record in items(tmp_path)] == [png(0), png(1)]
    assert {path.name for path in tmp_path.iterdir()} == {"x.tar"}


def test_pax_names_are_checked_like_others(tmp_path):
    """NUL and `..` in an extended header, which plain headers cannot hold."""
    for number, name in enumerate(["e\0.png", "ö/../../e.png"]):
        info = tarfile.TarInfo("e.png")
        info.pax_headers = {"path": name}
        put(tmp_path, f"{number}.tar", sample("a"), [(info, b"")], sample("z", 1),
            kind=tarfile.PAX_FORMAT)  # fmt: skip
    assert len(items(tmp_path, DeadLetter)) == 2
    assert len(items(tmp_path)) == 4


def test_pax_sparse_files_are_refused(tmp_path):
    """They would be read as zeros of any length."""
    info = tarfile.TarInfo("e.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": "999999999999"}
    put(tmp_path, "x.tar", [(info, b"abc")], sample("a"), kind=tarfile.PAX_FORMAT)
    assert "a sparse file" in only(tmp_path, DeadLetter).reason
    assert only(tmp_path).key == "x-a"


def test_large_members_are_refused(tmp_path, monkeypatch):
    """They are skipped without being held; so are long texts."""
    monkeypatch.setattr(tars_refusals, "LARGEST", 10_000)
    monkeypatch.setattr(tars_samples, "_LARGEST_TEXT", 5_000)
    put(tmp_path, "x.tar", sample("a", json=b" " * 6_000), [("b.png", b"x" * 20_000)], sample("c"))
    letters = {letter.key: letter.reason for letter in items(tmp_path, DeadLetter)}
    assert "a.json has 6000 bytes, at most 5000" in letters["x-a"]
    assert any("of 20000 bytes; at most 10000" in reason for reason in letters.values())
    assert only(tmp_path).key == "x-c"


@pytest.mark.parametrize("size", [257 << 20, 8**11 - 1, 2**60, 2**63])
def test_claimed_sizes_are_not_believed(tmp_path, size):
    """A header may claim any size; no memory is taken for it."""
    info = tarfile.TarInfo("b.png")
    info.size = size
    content = archive(sample("a"))[:-10240] + info.tobuf(tarfile.GNU_FORMAT) + b"x" * 1000
    tracemalloc.start()
    with pytest.raises(DamagedTarError, match="ends inside a member"):
        list(Members(io.BytesIO(content)))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_endless_extended_headers_are_refused(kind):
    """A name of gigabytes is damage."""
    info = hostile("x", kind)
    info.size = 3 << 30
    with pytest.raises(DamagedTarError, match="an extended header of 3221225472 bytes"):
        list(Members(io.BytesIO(info.tobuf() + bytes(10_240))))


@pytest.mark.parametrize(
    "record",
    [b"9 a=b\n", b"0 a=b\n", b"x a=b\n", b"6 ab\n\n", b"99 a=b\n", b"-1 a=b\n", b"12", b"6 a=bc",
     "²2 a=b\n".encode(), b"13 size=-55\n\n", b"12 size=1.5\n", b"9" * 5000],
)  # fmt: skip
def test_damaged_extended_headers(record):
    """Nothing that they could say is guessed."""
    info = hostile("x", tarfile.XHDTYPE)
    info.size = len(record)
    padded = record + bytes(-len(record) % 512)
    content = info.tobuf() + padded + archive(sample("a"))
    with pytest.raises(DamagedTarError):
        list(Members(io.BytesIO(content)))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(kind):
    """All formats, long names and names that are not ASCII, give what Python's reader gives."""
    names = ["a.png", "./b.png", "d" * 60 + "/" + "e" * 60 + ".png", "größe.png"]
    names += ["f" * 99 + ".p", "l" * 300 + ".png"] if kind != tarfile.USTAR_FORMAT else []
    folder = hostile("folder", tarfile.DIRTYPE)
    content = archive([(folder, b""), *((name, name.encode() * 70) for name in names)], kind)
    members = Members(io.BytesIO(content))
    assert [(member.name, members.content(member)) for member in members] == [
        (name, name.encode() * 70) for name in names
    ]


def test_cut_tar_gives_the_whole_samples(tmp_path):
    """Cut at every 256 bytes: a beginning of the samples, unchanged, and one dead letter."""
    path = put(tmp_path, "x.tar", *[sample(f"{n}", n) for n in range(4)])
    content, whole = path.read_bytes(), items(tmp_path)
    assert len(whole) == 4
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    counts = Counter()
    for cut in range(0, len(content), 256):
        path.write_bytes(content[:cut])
        records = items(tmp_path)
        assert records == whole[: len(records)]
        letters = items(tmp_path, DeadLetter)
        assert [letter.where for letter in letters] == ["x.tar"] * (cut < end + 512)
        assert all("at byte" in letter.reason for letter in letters)
        counts[len(records)] += 1
    assert set(counts) == {0, 1, 2, 3, 4}


def test_cut_between_members_is_seen(tmp_path):
    """Where Python's reader sees a normal end."""
    path = put(tmp_path, "x.tar", sample("a"), sample("b", 1))
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(1024 * 10, b"\0")[: 10 * 1024])
    end = len(archive([*sample("a"), *sample("b", 1)]).rstrip(b"\0")) // 512 * 512 + 512
    path.write_bytes(archive([*sample("a"), *sample("b", 1)])[:end])
    letter = only(tmp_path, DeadLetter)
    assert f"at byte {end}: the archive ends without its end mark" in letter.reason
    assert only(tmp_path).key == "x-a"


def test_flipped_headers_give_no_false_sample(tmp_path):
    """Bits flipped in headers: no exception, and no sample but those that were written."""
    path = put(tmp_path, "x.tar", *[sample(f"{n}", n) for n in range(3)])
    content, whole = path.read_bytes(), items(tmp_path)
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for header, byte in itertools.product(headers, range(512)):
        if (byte + header // 512) % 3:
            continue  # every third byte of a header, others in the next
        flipped = bytearray(content)
        flipped[header + byte] ^= 1 << (byte + header // 512) % 8
        assert {r.key for r in check(flipped, whole)} <= {r.key for r in whole}


def test_random_damage_never_raises(tmp_path):
    """Blocks overwritten, left out, doubled or zeroed: no exception, no key that was not there."""
    path = put(tmp_path, "x.tar", *[sample(f"{n}", n, json=about(n=n)) for n in range(4)],
               kind=tarfile.PAX_FORMAT)  # fmt: skip
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(400):
        blocks = [content[at : at + 512] for at in range(0, len(content), 512)]
        at = draw.randrange(len(blocks))
        damage = draw.randrange(4)
        if damage == 0:
            blocks[at] = draw.randbytes(512)
        elif damage == 1:
            del blocks[at]
        elif damage == 2:
            blocks.insert(draw.randrange(len(blocks)), blocks[at])
        else:
            blocks[at] = bytes(512)
        records = check(b"".join(blocks), None)
        assert {record.key for record in records} <= {f"x-{n}" for n in range(4)}


def check(content, whole):
    """The records of a tar with this content, which must be among the `whole` ones."""
    found = list(tar_items(content))
    records = [item for item in found if isinstance(item, Record)]
    if whole is not None:
        assert all(record in whole for record in records)
        assert len(records) == len(whole) or any(isinstance(item, DeadLetter) for item in found)
    return records


class Memory(LocalFolder):
    """A place with one tar."""

    content = b""

    def walk(self, below=""):  # noqa: ARG002
        return iter([type("Info", (), {"name": "x.tar"})])

    def open(self, name):  # noqa: ARG002
        return io.BytesIO(self.content)


def tar_items(content):
    place = Memory("nowhere")
    place.content = bytes(content)
    (partition,) = partitions(config("nowhere"), place)
    return partition.items()


def test_header_that_became_zeros_is_no_end(tmp_path):
    """An end mark with data behind it is damage: the sample before it may lack a member."""
    content = bytearray(archive([*sample("a"), *sample("b", 1)]))
    with tarfile.open(fileobj=io.BytesIO(bytes(content))) as tar:
        start = tar.getmember("b.txt").offset
    content[start : start + 512] = bytes(512)
    found = list(tar_items(content))
    assert [item.key for item in found] == ["x-a", "x"]
    assert f"at byte {start}: an end mark, but more data behind it" in found[1].reason


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x1f",
        b"no tar" * 200,
        b"\x1f\x8b",
        b"\x1f\x8b" * 600,
        gzip.compress(b"no tar", mtime=0),
        b"PK\3\4".ljust(512),
    ],
)
def test_file_that_is_no_tar_is_one_dead_letter(content):
    """It names the file and the byte."""
    (letter,) = tar_items(content)
    assert letter.where == "x.tar"
    assert "at byte 0" in letter.reason


def test_damaged_gzip(tmp_path):
    """Cut off or with flipped bits: no exception; a checksum that fails at the end is told."""
    content = archive(itertools.chain(*[sample(f"{n}", n) for n in range(3)]))
    packed = gzip.compress(content)
    for cut in range(0, len(packed), 101):
        assert any(isinstance(item, DeadLetter) for item in tar_items(packed[:cut]))
    for at in range(0, len(packed), 37):
        flipped = bytearray(packed)
        flipped[at] ^= 1 << at % 8
        list(tar_items(flipped))
    wrong = bytearray(packed)
    wrong[-8] ^= 1
    found = list(tar_items(wrong))
    assert isinstance(found[-1], DeadLetter)
    assert "CRC" in found[-1].reason


def test_memory_is_flat(tmp_path):
    """A tar of many samples takes no more memory than one of few."""
    peaks = []
    for count in (50, 800):
        members = [m for n in range(count) for m in sample(f"{n}", png=bytes([n % 251]) * 20_000)]
        path = put(tmp_path, "x.tar", members)
        del members
        (partition,) = partitions(config(tmp_path))
        tracemalloc.start()
        assert sum(isinstance(item, Record) for item in partition.items()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        path.unlink()
    assert peaks[1] < peaks[0] + 100_000


def test_partition_is_a_tar_and_can_be_pickled(tmp_path):
    """Each is read by itself, on another machine too."""
    for number in range(3):
        put(tmp_path, f"{number}.tar", sample("a", number), sample("b"))
    pieces = list(partitions(config(tmp_path)))
    assert [len(list(piece.items())) for piece in pieces] == [2, 2, 2]
    for piece in pieces:
        assert list(pickle.loads(pickle.dumps(piece)).items()) == list(piece.items())


def test_place_that_cannot_be_reached_is_no_damage(tmp_path):
    """An OSError of the place comes through; only damaged content makes dead letters."""

    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 1000:
                raise OSError("the server does not answer")
            return super().read(size)

    for content in (archive(sample("a")), gzip.compress(archive(sample("a")))):
        with pytest.raises(OSError, match="the server does not answer"):
            list(Members(Failing(content)))


def test_missing_tars_and_path_are_explained(tmp_path):
    """The error says what is expected, what was found and what to do."""
    with pytest.raises(ValueError, match=r"has no \*\.tar, .* found no file; data\.path"):
        partitions(config(tmp_path))
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found a\.zip"):
        partitions(config(tmp_path))
    with pytest.raises(ValueError, match=r"data\.path is not set: the source 'tars' needs"):
        partitions(DataConfig(source="tars"))


def test_limits_are_those_that_are_documented():
    """256 MiB a member."""
    assert tars_refusals.LARGEST == 256 << 20
    assert tars_members._LARGEST_HEADER == 1 << 20

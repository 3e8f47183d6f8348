import gc
import io
import json
import sys
import tarfile

import numpy as np
import pytest
from tiny_data import CONFIG, picture, record, records, write

from sdn.config import to_dict, with_overrides
from sdn.data.index import from_parquet, scan
from sdn.data.manifest import load_manifest
from sdn.data.preparation import normalise_caption
from sdn.data.records import DeadLetter, Exclusion
from sdn.data.shards import UNFINISHED
from sdn.data.verification import verify


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def dead_letters(folder):
    return [json.loads(line) for line in (folder / "dead-letters.jsonl").read_text().splitlines()]


def lenient(**changes):
    return with_overrides(CONFIG, {"failure_budget": "0.9"} | changes)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its tars open
def test_plain_webdataset_reads_the_shards(tmp_path):
    """WebDataset's own reader finds every sample, with image, main caption and labels."""
    import webdataset

    manifest = write(tmp_path)
    urls = [str(tmp_path / shard.name) for shard in manifest.shards("train")]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    read = {sample["__key__"]: sample for sample in dataset}
    gc.collect()  # its warning belongs to this test, not to a later one
    assert set(read) == {f"item-{n}" for n in range(17)}
    for n in range(17):
        sample = read[f"item-{n}"]
        assert np.array_equal(sample["png"], picture(n))
        assert sample["txt"] == f"picture {n}"
        assert sample["json"]["captions"] == [f"picture {n}", f"number {n}", f"the {n}th"]
        assert sample["json"]["labels"] == {"parity": "odd" if n % 2 else "even"}


def test_two_writes_are_byte_identical(tmp_path):
    """The same records in another order and another folder give the same bytes in every file."""
    one = write(tmp_path / "one")
    other = write(tmp_path / "else" / "where", list(reversed(records())))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "else" / "where")
    assert one == other
    assert one.digest == other.digest


def test_manifest_tells_what_there_is(tmp_path):
    """The manifest holds the preparation, the shards, exclusions, dead letters and attribution."""
    extra = [
        Exclusion(key="a", reason="no name"),
        Exclusion(key="b", reason="no name"),
        Exclusion(key="c", reason="a flag"),
        DeadLetter(key="d", where="list.csv", reason="no such file"),
    ]
    manifest = write(tmp_path, [*extra, *records()], lenient())
    assert manifest.shard_samples("train") == (5, 5, 5, 2)
    assert manifest.shard_samples("test") == (4,)
    assert manifest.shard_samples("validation") == ()
    assert manifest.exclusions == {"a flag": 1, "no name": 2}
    assert manifest.dead_letters == 1
    assert manifest.attribution == "nobody"
    assert manifest.preparation["resolution"] == manifest.resolution == 32
    assert "path" not in manifest.preparation
    assert dead_letters(tmp_path) == [{"key": "d", "where": "list.csv", "reason": "no such file"}]
    assert load_manifest(tmp_path) == manifest
    assert verify(tmp_path) == []


def test_digest_names_the_content(tmp_path):
    """The digest ignores where the source lay and follows every sample and parameter."""
    moved = with_overrides(CONFIG, {"path": "elsewhere", "failure_budget": "0.5"})
    base = write(tmp_path / "base").digest
    assert write(tmp_path / "moved", config=moved).digest == base
    assert write(tmp_path / "less", records()[:-1]).digest != base
    jpg = with_overrides(CONFIG, {"image_format": "jpg"})
    assert write(tmp_path / "jpg", config=jpg).digest != base


def test_index_points_at_the_members(tmp_path):
    """Offsets and lengths in the index cut exactly the members out of the tar."""
    manifest = write(tmp_path)
    shard = manifest.shards("train")[0]
    tar = (tmp_path / shard.name).read_bytes()
    rows = from_parquet((tmp_path / shard.index_name).read_bytes())
    with tarfile.open(tmp_path / shard.name) as archive:
        for row in rows:
            for name, extension in (("image", "png"), ("txt", "txt"), ("json", "json")):
                member = getattr(row, name)
                expected = archive.extractfile(f"{row.key}.{extension}").read()
                assert tar[member.offset : member.offset + member.length] == expected
        assert {info.mtime for info in archive} == {0}
    with (tmp_path / shard.name).open("rb") as file:
        assert scan(file) == rows


def test_captions_are_normalised(tmp_path):
    """Captions are NFC, without control or invisible characters, with single blanks."""
    assert (
        normalise_caption(" a\tbig\r\n  cafe\u0301\x00 \u200bcup\ufeff ") == "a big caf\u00e9 cup"
    )
    assert normalise_caption("\U0001f469\u200d\U0001f680") == "\U0001f469\u200d\U0001f680"
    assert normalise_caption("\x07 \u200b") == ""
    write(tmp_path, [record(0, captions=("\n", " the  cup "))])
    with tarfile.open(tmp_path / "train-00000.tar") as archive:
        assert archive.extractfile("item-0.txt").read() == b"the cup"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(99, image=b"<html>"), "cannot be decoded as an image"),
        (record(99, captions=("", "\x00 ")), "no caption with any text among its 2"),
        (record(0), "another record came before with the same key"),
        (record(99, split="val"), "split must be one of train, validation, test, not 'val'"),
        (record(99, key="a.b"), "a key has"),
        (record(99, key="a/b"), "a key has"),
        (record(99, key="a b"), "a key has"),
        (record(99, key=""), "a key has"),
        (record(99, key="__a__"), "a key has"),
        (record(99, key="k" * 91), "a key has"),
        (record(99, key="\udc80"), "surrogates not allowed"),
    ],
    ids=lambda value: value.key[:10] if hasattr(value, "key") else value[:12],
)
def test_unusable_records_become_dead_letters(tmp_path, bad, reason):
    """Whatever cannot become a sample is listed with its key and reason, and nothing else is."""
    manifest = write(tmp_path, [*records(), bad], lenient())
    (letter,) = dead_letters(tmp_path)
    assert letter["key"] == bad.key
    assert letter["where"] == "tiny"
    assert reason in letter["reason"]
    assert manifest.dead_letters == 1
    assert manifest.samples("train") + manifest.samples("test") == 21


def test_failure_budget_stops_preparation(tmp_path):
    """Above the budget the error tells how many, the first reasons and what to do; no data set."""
    items = [*records(18, 0), record(50, image=b""), record(51, captions=("",))]
    with pytest.raises(ValueError, match=r"2 of 20 records \(10\.0%\)") as error:
        write(tmp_path, items, with_overrides(CONFIG, {"failure_budget": "0.09"}))
    for text in ("item-50", "item-51", "no caption", "data.failure_budget", "dead-letters.jsonl"):
        assert text in str(error.value)
    assert not list(tmp_path.glob("*.tar"))
    with pytest.raises(ValueError, match="holds no data set"):
        load_manifest(tmp_path)
    exact = with_overrides(CONFIG, {"failure_budget": "0.1"})
    assert write(tmp_path, items, exact).dead_letters == 2


def test_nothing_to_train_on_is_refused(tmp_path):
    """No record at all and an empty train split are errors that leave no data set."""
    with pytest.raises(ValueError, match=r"gave no record \(1 exclusions\)"):
        write(tmp_path, [Exclusion(key="a", reason="no name")])
    with pytest.raises(ValueError, match=r"nothing to train on.*'test': 3"):
        write(tmp_path, records(0, 3))
    assert not (tmp_path / "manifest.json").exists()


def test_unwritable_folder_is_refused_before_work(tmp_path):
    """A folder that cannot be made is an error before the first record is read."""
    (tmp_path / "file").write_text("")

    def never():
        raise AssertionError("the source was read")
        yield

    with pytest.raises(ValueError, match="cannot write to"):
        write(tmp_path / "file" / "data", never())


def test_finished_and_foreign_folders_are_left_alone(tmp_path):
    """A finished data set is not rewritten, and tars of others are not overwritten."""
    write(tmp_path / "done")
    before = files_of(tmp_path / "done")
    with pytest.raises(ValueError, match="already holds a finished data set"):
        write(tmp_path / "done", records(3, 0))
    assert files_of(tmp_path / "done") == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train-00000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"holds train-00000\.tar without a manifest"):
        write(tmp_path / "foreign")
    assert files_of(tmp_path / "foreign") == {"train-00000.tar": b"precious"}


def test_cut_off_preparation_is_no_data_set_and_can_be_repeated(tmp_path, monkeypatch):
    """Killed before the manifest, a folder is no data set; the next run replaces what is left."""

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sdn.data.shards.write_manifest", crash)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "data", records(30, 0))
    assert (tmp_path / "data" / UNFINISHED).exists()
    with pytest.raises(ValueError, match="holds no data set"):
        load_manifest(tmp_path / "data")
    write(tmp_path / "data")
    write(tmp_path / "fresh")
    assert files_of(tmp_path / "data") == files_of(tmp_path / "fresh")


def test_limit_and_report(tmp_path):
    """At most `limit` records are read, and each is reported."""
    seen = []
    config = with_overrides(CONFIG, {"limit": "6"})
    manifest = write(tmp_path, records(), config, report=seen.append)
    assert manifest.samples("train") == 6
    assert seen == [1, 2, 3, 4, 5, 6]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    """Without webdataset nothing is written and the error says what to install."""
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"needs webdataset; install with: pip install 'sdn\[pip"):
        write(tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "manifest.json is missing"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "format version None, expected 1"),
        (b'{"format_version": 2}', "format version 2, expected 1"),
        (b'{"format_version": 1}', "does not match its own SHA-256"),
    ],
)
def test_unreadable_manifests_are_refused(tmp_path, content, text):
    """A missing, damaged or future manifest each give their own error, from verify too."""
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        load_manifest(tmp_path)
    (damage,) = verify(tmp_path)
    assert text in damage


def test_scan_refuses_other_tars(tmp_path):
    """A tar with a sample that is not whole, or something else in it, has no index."""
    with pytest.raises(ValueError, match="not a readable tar"):
        scan(io.BytesIO(b"<html>" * 200))
    (tmp_path / "a.txt").write_text("a")
    with tarfile.open(tmp_path / "half.tar", "w") as archive:
        archive.add(tmp_path / "a.txt", "a.txt")
    with pytest.raises(ValueError, match=r"sample 'a' has only \['txt'\]"):
        scan(io.BytesIO((tmp_path / "half.tar").read_bytes()))
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "a.txt", "a.exe")
    with pytest.raises(ValueError, match=r"unexpected member 'a\.exe'"):
        scan(io.BytesIO((tmp_path / "other.tar").read_bytes()))


def test_preparation_covers_the_whole_config(tmp_path):
    """Every field of the config but the source's folder and the budget is part of the manifest."""
    manifest = write(tmp_path)
    assert set(to_dict(CONFIG)) - set(manifest.preparation) == {"path", "failure_budget"}

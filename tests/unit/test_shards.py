import gc
import io
import json
import random
import sys
import tarfile
import zlib

import numpy as np
import pytest
from tiny_data import CONFIG, append, given, picture, record, records, tables, write, writing

from sdn.config import to_dict, with_overrides
from sdn.data.dataset import open_dataset
from sdn.data.dead_letters import TooManyDeadLetters
from sdn.data.files import LocalFolder
from sdn.data.index import from_parquet, scan
from sdn.data.manifest import read_manifest
from sdn.data.parts import UNFINISHED
from sdn.data.records import DeadLetter, Exclusion
from sdn.data.shards import preparation, write_dataset
from sdn.data.verification import verify


def files_of(folder):
    """Relative path -> bytes of every file."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def dead_letters(folder):
    lines = (folder / "dead-letters" / "0001.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def shuffled(work, orders):
    """A runner that ends orders in another order than they began, as several workers do."""
    results = [work(order) for order in orders]
    random.Random(len(results)).shuffle(results)
    return iter(results)


def lenient(**changes):
    return with_overrides(CONFIG, {"failure_budget": "0.9"} | changes)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its tars open
def test_plain_webdataset_reads_the_shards(tmp_path):
    """WebDataset's own reader finds every sample, with image, main caption and labels."""
    import webdataset

    write(tmp_path)
    urls = [str(tmp_path / shard.name) for shard in open_dataset(tmp_path).shards("train")]
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
    """Neither the order of the source, nor how it was cut, nor who worked when changes a byte."""
    one = write(tmp_path / "one")
    other = write(tmp_path / "else" / "where", list(reversed(records())))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "else" / "where")
    assert one == other
    assert one.digest == other.digest
    cut = LocalFolder(tmp_path / "cut")
    write_dataset(given(records(), size=7), cut, writing(run=shuffled))
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "one")


def test_manifest_tells_what_there_is(tmp_path):
    """The manifest holds the preparation, the shards, exclusions, dead letters and attribution."""
    extra = [
        Exclusion(key="a", reason="no name"),
        Exclusion(key="b", reason="no name"),
        Exclusion(key="c", reason="a flag"),
        DeadLetter(key="d", where="list.csv", reason="no such file"),
    ]
    manifest = write(tmp_path, [*extra, *records()], lenient())
    assert tables(tmp_path) == {"train": [5, 5, 5, 2], "validation": [], "test": [4]}
    assert manifest.exclusions == {"a flag": 1, "no name": 2}
    assert manifest.dead_letters == 1
    assert manifest.attribution == "nobody"
    assert (manifest.number, manifest.parent) == (1, None)
    assert manifest.preparation["resolution"] == manifest.resolution == 32
    assert "path" not in manifest.preparation
    assert dead_letters(tmp_path) == [{"key": "d", "where": "list.csv", "reason": "no such file"}]
    assert read_manifest(LocalFolder(tmp_path)) == manifest
    assert verify(LocalFolder(tmp_path)) == []
    assert not (tmp_path / UNFINISHED).exists()


def test_digest_names_the_content(tmp_path):
    """The digest ignores where the source lay and follows every sample and parameter."""
    moved = with_overrides(CONFIG, {"path": "elsewhere", "failure_budget": "0.5"})
    base = write(tmp_path / "base").digest
    assert write(tmp_path / "moved", config=moved).digest == base
    assert write(tmp_path / "less", records()[:-1]).digest != base
    jpg = with_overrides(CONFIG, {"image_format": "jpg"})
    assert write(tmp_path / "jpg", config=jpg).digest != base


def test_index_points_at_the_samples(tmp_path):
    """Offsets, lengths and checksums in the index cut exactly the members out of the tar."""
    write(tmp_path)
    shard = open_dataset(tmp_path).shards("train")[0]
    tar = (tmp_path / shard.name).read_bytes()
    index = from_parquet((tmp_path / shard.index_name).read_bytes())
    with tarfile.open(tmp_path / shard.name) as archive:
        for row, key in enumerate(index.keys):
            start = index.offset[row]
            span = tar[start : start + index.length[row]]
            assert zlib.crc32(span) == index.crc32[row]
            for name, extension in (("image", "png"), ("json", "json")):
                begin = getattr(index, f"{name}_offset")[row]
                payload = span[begin : begin + getattr(index, f"{name}_length")[row]]
                assert payload == archive.extractfile(f"{key}.{extension}").read()
        assert {info.mtime for info in archive} == {0}
        assert {info.size % 512 for info in archive} - {0}, "the padding is part of the test"
    with (tmp_path / shard.name).open("rb") as file:
        found = scan(file)
    for name in ("keys", "offset", "length", "crc32", "image_offset", "json_length"):
        assert list(getattr(found, name)) == list(getattr(index, name))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(99, image=b"<html>"), "cannot be decoded as an image"),
        (record(99, captions=("", "\x00 ")), "no caption with any text among its 2"),
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
    assert (tmp_path / letter["original"]).read_bytes() == bad.image
    assert tuple(letter["record"]["captions"]) == bad.captions
    assert reason in letter["reason"]
    assert manifest.dead_letters == 1
    assert manifest.samples("train") + manifest.samples("test") == 21


def test_failure_budget_stops_preparation(tmp_path):
    """Above the budget the error tells how many, the first reasons and what to do; no data set."""
    items = [*records(18, 0), record(50, image=b""), record(51, captions=("",))]
    with pytest.raises(TooManyDeadLetters, match=r"2 of 20 records \(10\.0%\)") as error:
        write(tmp_path, items, with_overrides(CONFIG, {"failure_budget": "0.09"}))
    for text in (
        "item-50",
        "item-51",
        "no caption",
        "data.failure_budget",
        "dead-letters/0001.jsonl",
    ):
        assert text in str(error.value)
    assert {letter.key for letter in error.value.letters} == {"item-50", "item-51"}
    assert not list(tmp_path.glob("*.tar"))
    with pytest.raises(ValueError, match="holds no data set"):
        read_manifest(LocalFolder(tmp_path))
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
        write_dataset(never(), LocalFolder(tmp_path / "file" / "data"), writing())


def test_finished_and_foreign_folders_are_left_alone(tmp_path):
    """A finished data set is not rewritten, and tars of others are not overwritten."""
    write(tmp_path / "done")
    before = files_of(tmp_path / "done")
    with pytest.raises(ValueError, match="already holds a finished data set"):
        write(tmp_path / "done", records(3, 0))
    assert files_of(tmp_path / "done") == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train-00000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"holds train-00000\.tar, which no manifest names"):
        write(tmp_path / "foreign")
    assert files_of(tmp_path / "foreign") == {"train-00000.tar": b"precious"}


class Stopped(Exception):  # noqa: N818
    """Ends a run in its middle."""


@pytest.mark.parametrize("after", range(6 + 5))  # parts and shards
def test_cut_off_preparation_goes_on(tmp_path, after):
    """Ended after any task, a place is no data set; the next run does only what is left."""
    made = []

    def stopping(work, orders):
        for order in orders:
            if len(made) == after:
                raise Stopped
            made.append(order)
            yield work(order)

    def counting(work, orders):
        for order in orders:
            before = files_of(tmp_path / "data")
            yield work(order)
            changed.append(files_of(tmp_path / "data") != before)

    files = LocalFolder(tmp_path / "data")
    with pytest.raises(Stopped):
        write_dataset(given(records()), files, writing(run=stopping, fingerprint="same"))
    with pytest.raises(ValueError, match="holds no data set"):
        read_manifest(files)
    changed = []
    write_dataset(given(records()), files, writing(run=counting, fingerprint="same"))
    assert changed.count(False) == after
    write(tmp_path / "fresh")
    assert files_of(tmp_path / "data") == files_of(tmp_path / "fresh")


def test_what_another_source_left_is_not_gone_on_with(tmp_path):
    """Parts made from other data, or with other settings, are dropped and not mixed in."""

    def stopping(work, orders):
        for number, order in enumerate(orders):
            if number == 3:
                raise Stopped
            yield work(order)

    files = LocalFolder(tmp_path / "data")
    with pytest.raises(Stopped):
        write_dataset(given(records(30, 0)), files, writing(run=stopping, fingerprint="old"))
    write_dataset(given(records()), files, writing(fingerprint="new"))
    write(tmp_path / "fresh")
    assert files_of(tmp_path / "data") == files_of(tmp_path / "fresh")


def test_a_changed_part_is_refused(tmp_path):
    """A part that is no longer what it was when it was made is named, and nothing is published."""

    def damaging(work, orders):
        for order in orders:
            yield work(order)
        for path in (tmp_path / UNFINISHED / "parts").glob("*.spans"):
            path.write_bytes(path.read_bytes().replace(b"picture", b"puncture"[:7]))

    with pytest.raises(ValueError, match="has changed since it was prepared; delete"):
        write(tmp_path, run=damaging)
    assert not (tmp_path / "manifest.json").exists()


def test_limit_and_report(tmp_path):
    """At most `limit` samples are written, whoever works when, and progress is reported."""
    seen = []
    config = with_overrides(CONFIG, {"limit": "6"})
    manifest = write(tmp_path / "one", config=config, report=lambda *at: seen.append(at))
    assert manifest.samples("train") == 6
    assert seen == [("read", 4, None), ("read", 8, None), ("written", 1, 2), ("written", 2, 2)]
    write(tmp_path / "other", config=config, run=shuffled)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_the_same_key_twice(tmp_path):
    """The same record again is left out; another one of the same key gets a key of its own."""
    other = record(0, image=record(99).image)
    manifest = write(tmp_path, [*records(), record(0), other])
    assert manifest.exclusions == {"the same record came before": 1}
    assert manifest.samples("train") == 18
    assert verify(LocalFolder(tmp_path)) == []
    keys = [
        key
        for shard in open_dataset(tmp_path).shards("train")
        for key in from_parquet((tmp_path / shard.index_name).read_bytes()).keys
    ]
    (renamed,) = set(keys) - {f"item-{n}" for n in range(17)}
    assert renamed.startswith("item-0-")
    assert len(renamed) == len("item-0-") + 8


def test_appending_adds_shards_and_names_the_parent(tmp_path):
    """New records become new shards; older ones stay byte for byte, and what is there stays so."""
    first = write(tmp_path)
    before = files_of(tmp_path)
    second = append(tmp_path, [*records(), record(40), record(41, "test")])
    assert (second.number, second.parent) == (2, first.digest)
    assert tables(tmp_path) == {"train": [5, 5, 5, 2, 1], "validation": [], "test": [4, 1]}
    after = files_of(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}
    assert set(after) - set(before) == {
        "train-00004.tar",
        "train-00004.parquet",
        "test-00001.tar",
        "test-00001.parquet",
        f"versions/{second.digest}.json",
        "dead-letters/0002.jsonl",
    }
    assert second.exclusions == {"it is there already": 21}
    assert read_manifest(LocalFolder(tmp_path), first.digest[:8]) == first
    assert verify(LocalFolder(tmp_path)) == []
    assert verify(LocalFolder(tmp_path), first.digest) == []


def test_appending_nothing_new_changes_nothing(tmp_path):
    """An append that finds every record there makes no version."""
    write(tmp_path)
    before = files_of(tmp_path)
    assert append(tmp_path, records()) is None
    assert files_of(tmp_path) == before


def test_a_changed_record_is_appended_under_a_key_of_its_own(tmp_path):
    """Another caption under a known key is a new record; the old shard is not rewritten."""
    write(tmp_path)
    second = append(tmp_path, [record(3, captions=("a mended caption",))])
    assert second.samples("train") == 18
    assert verify(LocalFolder(tmp_path)) == []


def test_a_killed_append_leaves_the_old_version(tmp_path):
    """Cut off at any task, the data set is what it was; the next append completes it."""
    write(tmp_path)
    before = files_of(tmp_path)

    def stopping(work, orders):
        for number, order in enumerate(orders):
            yield work(order)
            if number == 0:
                raise Stopped

    with pytest.raises(Stopped):
        append(tmp_path, [record(n) for n in range(40, 52)], run=stopping)
    assert {name: files_of(tmp_path)[name] for name in before} == before
    assert verify(LocalFolder(tmp_path)) == []
    assert append(tmp_path, [record(n) for n in range(40, 52)]).samples("train") == 29
    assert verify(LocalFolder(tmp_path)) == []


def test_appending_with_other_settings_is_refused(tmp_path):
    """What would mix two preparations is refused, naming what differs."""
    write(tmp_path)
    jpg = with_overrides(CONFIG, {"image_format": "jpg"})
    with pytest.raises(ValueError, match="image_format was 'png' and now is 'jpg'"):
        append(tmp_path, [record(40)], jpg)
    with pytest.raises(ValueError, match="holds no data set"):
        append(tmp_path / "nowhere", [record(40)])


def test_a_data_set_from_before_a_setting_goes_on_while_that_is_not_used(tmp_path):
    """Manifests of before name no `validation_from_train`, which then was not possible."""
    first = write(tmp_path)
    assert "validation_from_train" not in first.preparation
    drawn = with_overrides(CONFIG, {"validation_from_train": "true"})
    with pytest.raises(ValueError, match="validation_from_train was False and now is True"):
        append(tmp_path, [record(40)], drawn)
    assert append(tmp_path, [record(40)]).number == 2


def test_missing_packages_are_named(tmp_path, monkeypatch):
    """Without pyarrow nothing is written and the error says what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow; install with: pip install 'sdn\[pip"):
        write(tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "manifest.json is missing"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "format version None, expected 2"),
        (b'{"format_version": 1}', "format version 1, expected 2"),
        (b'{"format_version": 2}', "does not match its own SHA-256"),
    ],
)
def test_unreadable_manifests_are_refused(tmp_path, content, text):
    """A missing, damaged or future manifest each give their own error, from verify too."""
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        read_manifest(LocalFolder(tmp_path))
    (damage,) = verify(LocalFolder(tmp_path))
    assert text in damage


def test_scan_refuses_other_tars(tmp_path):
    """A tar with a sample that is not whole, or something else in it, has no index."""
    with pytest.raises(ValueError, match="not a readable tar"):
        scan(io.BytesIO(b"<html>" * 200))
    (tmp_path / "a.txt").write_text("a")
    with tarfile.open(tmp_path / "half.tar", "w") as archive:
        archive.add(tmp_path / "a.txt", "a.txt")
    with pytest.raises(ValueError, match=r"the last sample has only \['txt'\]"):
        scan(io.BytesIO((tmp_path / "half.tar").read_bytes()))
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "a.txt", "a.exe")
    with pytest.raises(ValueError, match=r"unexpected member 'a\.exe'"):
        scan(io.BytesIO((tmp_path / "other.tar").read_bytes()))


def test_preparation_covers_the_whole_config(tmp_path):
    """Every field of the config that a byte depends on is part of the manifest."""
    config = with_overrides(CONFIG, {"validation_from_train": "true"})
    left_out = {"path", "failure_budget", "max_pixels"}
    assert set(to_dict(config)) - set(preparation(config)) == left_out
    manifest = write(tmp_path)
    assert manifest.preparation == preparation(CONFIG)

import itertools
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
import webdataset
from shard_builder import Item, write_dataset
from tiny_data import picture

from sdn.data.dataset import open_dataset
from sdn.data.files import LocalFolder
from sdn.data.images import decode_prepared, encode
from sdn.data.loader import DamagedSample, ShardReader, batches, load_split, split_blocks, worker_of
from sdn.data.plan import Plan


def items(numbers, image_format="png"):
    return [
        Item(
            f"item-{n}",
            encode(picture(n), image_format),
            (f"picture {n}", f"number {n}", f"the {n}th"),
            {"parity": "odd" if n % 2 else "even"},
        )
        for n in numbers
    ]


def splits(image_format="png"):
    """22 training and 4 test samples: shards of 5, the last of 2."""
    return {
        "train": items(range(22), image_format),
        "validation": [],
        "test": items(range(22, 26), image_format),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, splits())
    return folder


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


def plan_of(folder, **changes):
    samples = open_dataset(folder).shards("train").samples
    return Plan(**({"shard_samples": samples, "seed": 3, "global_batch": 8, "lanes": 8} | changes))


def read_all(folder, split="train"):
    """Every sample of a split, one reader for all."""
    reader = reader_of(folder, split)
    sizes = reader.shards.samples.tolist()
    return [reader.read(shard, row) for shard, rows in enumerate(sizes) for row in range(rows)]


def reader_of(place, split="train", **arguments):
    return ShardReader(open_dataset(place), split, **arguments)


def same(one, other):
    return torch.equal(one.pixels, other.pixels) and all(
        getattr(one, name) == getattr(other, name)
        for name in ("keys", "captions", "labels", "epoch", "step", "weight")
    )


def test_samples_are_what_was_written(data):
    """Pixels, captions and labels of every sample come back exactly."""
    samples = {sample.key: sample for sample in read_all(data)}
    assert len(samples) == 22
    for n in range(22):
        sample = samples[f"item-{n}"]
        assert np.array_equal(sample.pixels.permute(1, 2, 0).numpy(), picture(n))
        assert sample.captions == (f"picture {n}", f"number {n}", f"the {n}th")
        assert sample.labels == {"parity": "odd" if n % 2 else "even"}


def test_load_split_keeps_the_order_of_the_manifest(data):
    """A whole split comes as arrays, row for row what the reader gives."""
    arrays = load_split(data, "train")
    samples = read_all(data)
    assert arrays.keys == tuple(s.key for s in samples)
    assert arrays.pixels.shape == (22, 3, 32, 32)
    assert arrays.pixels.dtype == torch.uint8
    assert torch.equal(arrays.pixels, torch.stack([s.pixels for s in samples]))
    assert arrays.captions == tuple(s.captions for s in samples)
    assert arrays.labels == tuple(s.labels for s in samples)


@pytest.mark.parametrize("size", [1, 4, 5, 7, 22, 99])
@pytest.mark.parametrize("most", [None, 0, 1, 5, 6, 21, 22, 99])
def test_blocks_are_the_split(data, size, most):
    """Blocks of any size together are the first so many samples, in the manifest's order."""
    whole, count = load_split(data, "train"), 22 if most is None else min(most, 22)
    found = list(split_blocks(data, "train", size=size, most=most))
    assert [len(block.keys) for block in found] == [
        min(size, count - start) for start in range(0, count, size)
    ]
    for name in ("keys", "captions", "labels"):
        assert sum((getattr(block, name) for block in found), ()) == getattr(whole, name)[:count]
    pixels = [block.pixels.clone() for block in found]
    assert torch.equal(torch.cat([whole.pixels[:0], *pixels]), whole.pixels[:count])


def test_blocks_that_are_kept_stay_as_they_were(data):
    """A block is not overwritten by the next one."""
    found = list(split_blocks(data, "train", size=5))
    assert torch.equal(torch.cat([b.pixels for b in found]), load_split(data, "train").pixels)


def test_an_empty_split_has_no_blocks(data):
    """No samples are no error here, an unknown split and a damaged sample are."""
    assert list(split_blocks(data, "validation")) == []
    with pytest.raises(ValueError, match="no split 'val'"):
        next(split_blocks(data, "val"))


def test_blocks_close_the_shards_when_dropped(data, monkeypatch):
    """Who stops early leaves no shard open."""
    closed, close = [], ShardReader.close
    monkeypatch.setattr(ShardReader, "close", lambda self: closed.append(close(self)))
    run = split_blocks(data, "train", size=4)
    next(run)
    assert not closed
    run.close()
    assert len(closed) == 1


def test_missing_splits_are_refused(data):
    """An unknown and an empty split are errors."""
    with pytest.raises(ValueError, match="no split 'val'; there are: train, validation, test"):
        load_split(data, "val")
    with pytest.raises(ValueError, match=r"'validation' .* is empty"):
        load_split(data, "validation")


def test_rows_outside_a_shard_are_refused(data):
    """A row that does not exist is an IndexError, also a negative one."""
    reader = reader_of(data)
    for row in (5, -1):
        with pytest.raises(IndexError, match=f"has 5 samples, no row {row}"):
            reader.read(0, row)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_world_size_consumes_the_same_global_batches(data, world):
    """Over two epochs the ranks' batches together are the single rank's, in the same order."""
    plan = plan_of(data)
    steps = 2 * plan.steps_per_epoch
    alone = list(batches(data, "train", plan=plan, seed=1, steps=steps))
    ranks = [
        list(batches(data, "train", plan=plan, seed=1, steps=steps, rank=rank, world=world))
        for rank in range(world)
    ]
    assert {len(rank) for rank in ranks} == {len(alone)} == {6}
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        rounds = range(max(len(part.keys) for part in parts))
        rows = [(part, i) for i in rounds for part in parts if i < len(part.keys)]
        assert tuple(part.keys[i] for part, i in rows) == whole.keys
        assert tuple(part.captions[i] for part, i in rows) == whole.captions
        assert torch.equal(torch.stack([part.pixels[i] for part, i in rows]), whole.pixels)
        assert sum(part.weight for part in parts) == pytest.approx(world)


def test_padded_batches_weigh_nothing(data):
    """A rank without a sample in the last batch gets one real row, no key, and weight 0."""
    plan = plan_of(data)  # 22 samples: the last batch has 6, so ranks 6 and 7 of 8 have none
    last = {"plan": plan, "seed": 1, "start_step": 2, "steps": 1, "world": 8}
    (batch,) = batches(data, "train", rank=7, **last)
    assert batch.keys == ()
    assert batch.weight == 0
    assert batch.pixels.shape == (1, 3, 32, 32)
    assert len(batch.captions) == len(batch.labels) == 1
    assert batch.captions[0]


def test_each_epoch_consumes_every_sample_once(data):
    """The keys of an epoch are all keys; over three epochs all three captions of each are used."""
    plan = plan_of(data)
    run = list(batches(data, "train", plan=plan, seed=1, steps=3 * plan.steps_per_epoch))
    for epoch in range(3):
        keys = [key for batch in run if batch.epoch == epoch for key in batch.keys]
        assert sorted(keys) == sorted(f"item-{n}" for n in range(22))
    pairs = [pair for batch in run for pair in zip(batch.keys, batch.captions, strict=True)]
    assert len(set(pairs)) == 66


@pytest.mark.parametrize("start", [1, 3, 4, 8, 10])
def test_resuming_goes_on_with_the_same_batches(data, start):
    """From any step, in later epochs too, the batches are those of the uninterrupted run."""
    plan = plan_of(data)
    whole = list(batches(data, "train", plan=plan, seed=1, steps=12))
    resumed = list(batches(data, "train", plan=plan, seed=1, start_step=start, steps=12 - start))
    assert len(resumed) == 12 - start
    assert all(same(a, b) for a, b in zip(whole[start:], resumed, strict=True))


def test_cache_workers_and_prefetch_change_nothing(data):
    """Without a cache, with a tiny one, with any number of threads and batches ahead: the same."""
    plan = plan_of(data)
    runs = [
        list(batches(data, "train", plan=plan, seed=1, steps=7, **how))
        for how in (
            {"workers": workers, "prefetch": prefetch, "cache_gib": gib}
            for workers in range(5)
            for prefetch in (0, 1, 5)
            for gib in (0, 1e-5, 0.5)
        )
    ]
    for run in runs[1:]:
        assert len(run) == 7
        assert all(same(a, b) for a, b in zip(runs[0], run, strict=True))


def test_jpegs_are_decoded_as_they_are(tmp_path):
    """A data set of JPEGs gives what decoding each one gives, channels last in memory."""
    write_dataset(tmp_path, splits("jpg"))
    found = load_split(tmp_path, "train")
    assert found.pixels.is_contiguous(memory_format=torch.channels_last)
    for item, pixels in zip(splits("jpg")["train"], found.pixels, strict=True):
        expected = decode_prepared(item.image, 32)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_batches_that_are_kept_stay_as_they_were(data):
    """Memory is used again only once nothing refers to it, be it a part of a batch."""
    plan = plan_of(data)
    run = batches(data, "train", plan=plan, seed=1, steps=9, workers=0, cache_gib=0)
    kept, copies = [], []
    for n, batch in enumerate(run):
        part = (batch.pixels, batch.pixels[1:, :2], batch.pixels.numpy())[n % 3]
        kept.append(part)
        copies.append(part.copy() if n % 3 == 2 else part.clone())
        del batch, part
    for one, other in zip(kept, copies, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_memory_of_a_batch_is_used_again(data):
    """What was let go of is filled with the next batch."""
    reader = reader_of(data, cache_gib=0)
    rows = np.arange(5)
    address = reader.read_batch(rows * 0, rows).pixels.data_ptr()
    again = reader.read_batch(rows * 0, rows)
    assert again.pixels.data_ptr() == address
    assert reader.read_batch(rows * 0, rows).pixels.data_ptr() != address


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_each_step_is_prepared_by_its_worker(data, monkeypatch, workers):
    """Which thread prepares a batch depends on its step alone, and none is far ahead."""
    plan, prepared = plan_of(data), {}
    real = ShardReader.read_batch

    def read_batch(self, shards, rows):
        prepared[tuple(rows.tolist()), tuple(shards.tolist())] = threading.current_thread().name
        return real(self, shards, rows)

    monkeypatch.setattr(ShardReader, "read_batch", read_batch)
    run = batches(data, "train", plan=plan, seed=1, start_step=2, workers=workers, prefetch=2)
    next(run)
    assert len(prepared) <= 1 + 2 * workers
    for _ in itertools.islice(run, 9):
        pass
    run.close()
    threads = {}
    for step in range(2, 11):
        part = plan.samples_of(step)
        name = prepared[tuple(part.rows.tolist()), tuple(part.shards.tolist())]
        threads.setdefault(worker_of(step, 2, workers), set()).add(name)
    assert len(threads) == workers
    assert all(len(names) == 1 for names in threads.values())
    assert len(set.union(*threads.values())) == workers


def test_changing_a_batch_does_not_change_the_cache(data):
    """Pixels of a batch may be overwritten; the next epoch reads the originals."""
    plan = plan_of(data, global_batch=22, lanes=1)
    run = batches(data, "train", plan=plan, seed=1, steps=2, workers=0)
    next(run).pixels.zero_()
    assert all(pixels.any() for pixels in next(run).pixels)


def threads_left():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_ends_the_threads(data, workers, taken):
    """The threads end when the iterator is closed or dropped, though it could go on for ever."""
    for close in (True, False):
        run = batches(data, "train", plan=plan_of(data), seed=1, workers=workers)
        assert [batch.step for batch in itertools.islice(run, taken)] == list(range(taken))
        assert bool(threads_left()) == (taken > 0)
        if close:
            run.close()
        del run
        assert not threads_left()


@pytest.mark.timeout(60)
def test_a_process_may_end_with_batches_left(data):
    """A consumer that ends without closing does not hang."""
    code = (
        "from sdn.data.loader import batches; from sdn.data.plan import Plan; import sys;"
        "from sdn.data.dataset import open_dataset; n = open_dataset(sys.argv[1]).shards('train');"
        "run = batches(sys.argv[1], 'train', seed=1, workers=3,"
        " plan=Plan(shard_samples=n.samples, seed=1, global_batch=8)); next(run)"
    )
    subprocess.run([sys.executable, "-c", code, str(data)], check=True, timeout=50)


def test_impossible_requests_fail_at_once(data):
    """A plan of other data, an impossible world, rank or step fail before the first batch."""
    plan = plan_of(data)
    with pytest.raises(ValueError, match="the plan is for 9 samples in 1 shards"):
        batches(data, "train", plan=plan_of(data, shard_samples=(9,)), seed=1)
    with pytest.raises(ValueError, match="possible: 1, 2, 4, 8"):
        batches(data, "train", plan=plan, seed=1, world=3)
    with pytest.raises(ValueError, match="rank must be"):
        batches(data, "train", plan=plan, seed=1, rank=2, world=2)
    with pytest.raises(ValueError, match="step must be"):
        batches(data, "train", plan=plan, seed=1, start_step=-1)
    with pytest.raises(ValueError, match="must be >= 0, not -1 and 2"):
        batches(data, "train", plan=plan, seed=1, workers=-1)
    with pytest.raises(ValueError, match="holds no data set"):
        batches(data / "nowhere", "train", plan=plan, seed=1)


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def truncate(path, length):
    path.write_bytes(path.read_bytes()[:length])


def exchange(one, other):
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def member(folder, name, row=2):
    """Offset and length of a member of one sample of train-00001."""
    with tarfile.open(folder / "train-00001.tar") as archive:
        found = archive.getmembers()[3 * row + ("image", "json", "txt").index(name)]
        return found.offset_data, found.size


def middle(folder):
    """Offset of a byte in the middle of an image."""
    start, length = member(folder, "image")
    return start + length // 2


TAR, OTHER_TAR = "train-00001.tar", "train-00002.tar"
INDEX, OTHER_INDEX = "train-00001.parquet", "train-00002.parquet"

# Ways that were seen elsewhere; most of them pass a plain tar reader unnoticed.
DAMAGES = {
    "cut at a header": lambda at: truncate(at / TAR, member(at, "txt")[0] - 512),
    "cut inside a payload": lambda at: truncate(at / TAR, middle(at)),
    "cut at a sample boundary": lambda at: truncate(at / TAR, member(at, "json")[0] - 512),
    "bit in the image": lambda at: flip(at / TAR, middle(at)),
    "bit in the caption": lambda at: flip(at / TAR, member(at, "txt")[0]),
    "bit in the labels": lambda at: flip(at / TAR, member(at, "json")[0] + 5),
    "bit in a header": lambda at: flip(at / TAR, member(at, "json")[0] - 300),
    "bit in the padding": lambda at: flip(at / TAR, member(at, "txt")[0] + 100),
    "bit in the index": lambda at: flip(at / INDEX, 40),
    "error page": lambda at: (at / TAR).write_bytes(b"<html>503</html>"),
    "empty file": lambda at: (at / TAR).write_bytes(b""),
    "missing shard": lambda at: (at / TAR).unlink(),
    "missing index": lambda at: (at / INDEX).unlink(),
    "exchanged shards": lambda at: exchange(at / TAR, at / OTHER_TAR),
    "exchanged indexes": lambda at: exchange(at / INDEX, at / OTHER_INDEX),
    "bit in the manifest": lambda at: flip(at / "manifest.json", 300),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found(copy, kind):
    """Training stops at the damage instead of using or skipping it."""
    plan = plan_of(copy)
    DAMAGES[kind](copy)
    with pytest.raises(ValueError, match=r"train-0000[12]|manifest"):
        list(batches(copy, "train", plan=plan, seed=1, steps=plan.steps_per_epoch))


def test_damage_names_shard_key_and_reason(copy):
    """The error says which sample of which shard is damaged and how; the others can be read."""
    DAMAGES["bit in the image"](copy)
    reader = reader_of(copy)
    key = reader.index(1).keys[2]
    with pytest.raises(DamagedSample) as caught:
        reader.read(1, 2)
    assert (caught.value.shard, caught.value.key) == ("train-00001.tar", key)
    assert str(caught.value) == (f"train-00001.tar, sample {key!r}: has another checksum (CRC-32)")
    assert reader.read(1, 1).key != key
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_shard_cut_while_it_is_read_is_found(copy):
    """A shard that shrinks after it was opened gives no half sample."""
    reader = reader_of(copy)
    reader.index(1)
    start, length = member(copy, "image")
    truncate(copy / "train-00001.tar", start + length // 2)
    with pytest.raises(DamagedSample, match="is cut off after"):
        reader.read(1, 2)


def test_damage_reaches_the_consumer_at_its_step(copy):
    """Batches before the damaged sample arrive; the error comes at the batch that holds it."""
    plan = plan_of(copy)
    DAMAGES["bit in the image"](copy)
    steps = range(plan.steps_per_epoch)
    (bad,) = (step for step in steps if (1, 2) in plan.samples_of(step).samples)
    run = batches(copy, "train", plan=plan, seed=1, prefetch=5)
    assert [batch.step for batch in itertools.islice(run, bad)] == list(range(bad))
    with pytest.raises(DamagedSample, match="train-00001"):
        next(run)


def test_without_pyarrow_the_index_comes_from_the_tar(copy, monkeypatch):
    """The core needs no pyarrow: the same samples are read, and a damaged shard is refused."""
    expected = [sample.key for sample in read_all(copy)]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert [sample.key for sample in read_all(copy)] == expected
    flip(copy / "train-00001.tar", 700)
    with pytest.raises(DamagedSample, match=r"train-00001\.tar: the shard has another SHA-256"):
        read_all(copy)


def test_another_sample_in_its_place_is_found(data):
    """Bytes that are intact but another sample's are refused."""
    reader = reader_of(data)
    reader.index(1).keys[0] = "item"
    with pytest.raises(DamagedSample, match="'item': sample 'item-5' lies in its place"):
        reader.read(1, 0)


class Remote(LocalFolder):
    """A place that fetches ahead, and keeps copies of which the first is damaged."""

    def __init__(self, path, damaged=0):
        super().__init__(path)
        self.fetched, self.forgotten, self.damaged = [], [], damaged

    def prefetch(self, name, offset, length):
        self.fetched.append((name, offset, length))

    def forget(self, name):
        self.forgotten.append(name)

    def read_range(self, name, offset, length):
        data = super().read_range(name, offset, length)
        if self.damaged > 0:
            self.damaged -= 1
            return data[:-1] + bytes([data[-1] ^ 1])
        return data


def test_a_damaged_copy_is_read_anew(data):
    """Where a place keeps copies, a bad one is forgotten once; a second one is damage."""
    for opened, name in ((False, "train-00001.parquet"), (True, "train-00001.tar")):
        place = Remote(data)
        reader = reader_of(place, cache_gib=0)
        if opened:
            reader.index(1)
        place.damaged = 1
        assert reader.read(1, 2).key == "item-7"
        assert place.forgotten == [name]
        place.damaged = 2
        with pytest.raises(DamagedSample, match=r"has another (SHA-256|checksum)"):
            (reader if opened else reader_of(place)).read(1, 3 if opened else 2)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_place_is_told_what_comes(data, workers):
    """The spans of coming steps, and the indexes that are needed, are asked for beforehand."""
    plan, place = plan_of(data), Remote(data)
    run = batches(place, "train", plan=plan, seed=1, steps=3, workers=workers, cache_gib=0)
    expected = list(batches(data, "train", plan=plan, seed=1, steps=3, workers=0))
    assert all(same(a, b) for a, b in zip(run, expected, strict=True))
    spans = [found for found in place.fetched if found[0].endswith(".tar")]
    assert len(set(spans)) == len(spans) == 22
    indexes = {found[0] for found in place.fetched if found[0].endswith(".parquet")}
    assert indexes == {f"train-0000{n}.parquet" for n in range(5)}


def test_few_indexes_are_kept(tmp_path, monkeypatch):
    """What is kept in memory is bounded, and what was let go of is read again."""
    monkeypatch.setattr("sdn.data.reading._INDEXES", 2)
    monkeypatch.setattr("sdn.data.reading._INDEX_ROWS", 9)
    write_dataset(tmp_path, splits())
    reader = reader_of(tmp_path, cache_gib=0)
    for _ in range(2):
        for shard in range(5):
            assert reader.read(shard, 0).key == f"item-{5 * shard}"
            assert len(reader._indexes._kept) <= 2


def plain(urls, **arguments):
    """Samples as plain WebDataset gives them."""
    return webdataset.WebDataset(urls, shardshuffle=False, empty_check=False, **arguments)


def test_shards_are_read_by_plain_webdataset(data):
    """Any WebDataset reader gets key, image, captions and labels."""
    found = list(plain([str(path) for path in sorted(data.glob("train-*.tar"))]).decode())
    assert [sample["__key__"] for sample in found] == [f"item-{n}" for n in range(22)]
    for n, sample in enumerate(found):
        assert sample["txt"] == f"picture {n}"
        assert sample["json"]["captions"] == [f"picture {n}", f"number {n}", f"the {n}th"]
        assert sample["json"]["labels"] == {"parity": "odd" if n % 2 else "even"}
    (first,) = itertools.islice(plain(str(data / "train-00000.tar")).decode("rgb8"), 1)
    assert np.array_equal(first["png"], picture(0))


def test_shards_are_split_by_plain_webdataset(data, monkeypatch):
    """Its split_by_node gives each of two nodes its own shards, together all samples."""
    urls = [str(path) for path in sorted(data.glob("train-*.tar"))]
    monkeypatch.setenv("WORLD_SIZE", "2")
    keys = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        run = plain(urls, nodesplitter=webdataset.split_by_node)
        keys.append([sample["__key__"] for sample in run])
    assert sorted(keys[0] + keys[1]) == sorted(f"item-{n}" for n in range(22))
    assert not set(keys[0]) & set(keys[1])

import itertools
import pickle
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from tiny_data import picture, records, write

from sdn.data.index import from_parquet
from sdn.data.loader import DamagedSample, ShardReader, batches, load_split
from sdn.data.manifest import load_manifest
from sdn.data.plan import Plan
from sdn.data.verification import verify


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder, records(22, 4))
    return folder


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


def plan_of(folder, **changes):
    samples = load_manifest(folder).shard_samples("train")
    return Plan(**({"shard_samples": samples, "seed": 3, "global_batch": 8, "lanes": 8} | changes))


def read_all(folder, split="train"):
    """Every sample of a split, one reader for all."""
    manifest = load_manifest(folder)
    reader = ShardReader(folder, manifest, split)
    return [
        reader.read(shard, row)
        for shard, rows in enumerate(manifest.shard_samples(split))
        for row in range(rows)
    ]


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


def test_missing_splits_are_refused(data):
    """An unknown and an empty split are errors."""
    with pytest.raises(ValueError, match="no split 'val'; there are: train, validation, test"):
        load_split(data, "val")
    with pytest.raises(ValueError, match=r"'validation' .* is empty"):
        load_split(data, "validation")


def test_rows_outside_a_shard_are_refused(data):
    """A row that does not exist is an IndexError, also a negative one."""
    reader = ShardReader(data, load_manifest(data), "train")
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


def test_cache_and_prefetch_change_nothing(data):
    """Without a cache, with a tiny one, with and without the thread: the same batches."""
    plan = plan_of(data)
    runs = [
        list(batches(data, "train", plan=plan, seed=1, steps=7, prefetch=p, cache_gib=gib))
        for p in (0, 1, 5)
        for gib in (0, 1e-5, 0.5)
    ]
    for run in runs[1:]:
        assert all(same(a, b) for a, b in zip(runs[0], run, strict=True))


def test_changing_a_batch_does_not_change_the_cache(data):
    """Pixels of a batch may be overwritten; the next epoch reads the originals."""
    plan = plan_of(data, global_batch=22, lanes=1)
    run = batches(data, "train", plan=plan, seed=1, steps=2, prefetch=0)
    next(run).pixels.zero_()
    assert all(pixels.any() for pixels in next(run).pixels)


def test_closing_ends_the_thread(data):
    """The reading thread ends when the iterator is closed, though it could go on for ever."""
    run = batches(data, "train", plan=plan_of(data), seed=1)
    assert next(run).step == 0
    assert any(thread.name == "batches" for thread in threading.enumerate())
    run.close()
    assert not any(thread.name == "batches" for thread in threading.enumerate())


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
    found = getattr(from_parquet((folder / "train-00001.parquet").read_bytes())[row], name)
    return found.offset, found.length


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
    """Verify reports the damage, and training stops at it instead of using or skipping it."""
    plan = plan_of(copy)
    assert verify(copy) == []
    DAMAGES[kind](copy)
    found = verify(copy)
    assert found
    if kind != "bit in the manifest":
        assert any("train-00001" in text for text in found)
    with pytest.raises(ValueError, match=r"train-0000[12]|manifest"):
        list(batches(copy, "train", plan=plan, seed=1, steps=plan.steps_per_epoch))


@pytest.mark.parametrize("name", ["train-00009.tar", "extra.tar", "train-00009.parquet"])
def test_extra_shards_are_found(copy, name):
    """A shard that the manifest does not name is reported, and never read."""
    shutil.copy(copy / "train-00000.tar", copy / name)
    assert verify(copy) == [f"{name}: not named in the manifest"]
    assert len(read_all(copy)) == 22


def test_bit_in_a_header_is_found(copy):
    """A flipped bit between the payloads harms no sample of ours; verify still reports it."""
    flip(copy / "train-00001.tar", member(copy, "image")[0] - 512)
    (text,) = verify(copy)
    assert "train-00001.tar: has SHA-256" in text
    assert len(read_all(copy)) == 22


def test_any_flipped_bit_is_found(copy):
    """Wherever a bit of a shard, an index or the manifest flips, verify reports it."""
    names = ["train-00001.tar", "train-00001.parquet", "manifest.json"]
    random = np.random.default_rng(0)
    for name in names * 10:
        path = copy / name
        offset = int(random.integers(path.stat().st_size))
        flip(path, offset)
        assert verify(copy), (name, offset)
        flip(path, offset)
    assert verify(copy) == []


def test_lost_dead_letters_are_found(copy):
    """The list of dead letters must be there in full."""
    (copy / "dead-letters.jsonl").write_text("{}\n")
    assert verify(copy) == ["dead-letters.jsonl: lists 1 dead letters, expected 0"]


def test_damage_names_shard_key_and_reason(copy):
    """The error says which sample of which shard is damaged and how; the others can be read."""
    DAMAGES["bit in the image"](copy)
    reader = ShardReader(copy, load_manifest(copy), "train")
    key = reader.index(1)[2].key
    with pytest.raises(DamagedSample) as caught:
        reader.read(1, 2)
    assert (caught.value.shard, caught.value.key) == ("train-00001.tar", key)
    assert str(caught.value) == (
        f"train-00001.tar, sample {key!r}: image has another checksum (CRC-32)"
    )
    assert reader.read(1, 1).key != key
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_shard_cut_while_it_is_read_is_found(copy):
    """A shard that shrinks after it was opened gives no half sample."""
    reader = ShardReader(copy, load_manifest(copy), "train")
    reader.index(1)
    start, length = member(copy, "image")
    truncate(copy / "train-00001.tar", start + length // 2)
    with pytest.raises(DamagedSample, match="image is cut off after"):
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
    assert verify(copy) == []
    flip(copy / "train-00001.tar", 700)
    with pytest.raises(DamagedSample, match=r"train-00001\.tar: the shard has another SHA-256"):
        read_all(copy)

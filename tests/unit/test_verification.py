"""Every kind of damage is found by `verify`, and never trained on."""

import random
import shutil
import tarfile
from functools import partial

import pytest
import torch
from tiny_data import records, write

from sdn.data.dataset import open_dataset
from sdn.data.files import LocalFolder
from sdn.data.loader import batches
from sdn.data.plan import Plan
from sdn.data.reading import DamagedSample
from sdn.data.verification import verify

TAR, OTHER = "train-00001.tar", "train-00002.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write(folder, records(20, 5))
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def members(path):
    with tarfile.open(path) as archive:
        return archive.getmembers()


def flip(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


def at_header(folder):
    cut(folder / TAR, members(folder / TAR)[4].offset + 200)


def in_payload(folder):
    cut(folder / TAR, members(folder / TAR)[3].offset_data + 100)


def between_members(folder):
    cut(folder / TAR, members(folder / TAR)[4].offset)


def at_sample_boundary(folder):
    cut(folder / TAR, members(folder / TAR)[6].offset)


def bit_in_header(folder):
    flip(folder / TAR, members(folder / TAR)[5].offset + 2)


def bit_in_padding(folder):
    flip(folder / TAR, members(folder / TAR)[5].offset - 1)


def bit_in_payload(folder):
    flip(folder / TAR, members(folder / TAR)[3].offset_data + 50, bit=5)


def bit_in_index(folder):
    path = folder / TAR.replace("tar", "parquet")
    flip(path, path.stat().st_size // 2)


def zeroed_header(folder):
    data = bytearray((folder / TAR).read_bytes())
    start = members(folder / TAR)[3].offset
    data[start : start + 512] = bytes(512)
    (folder / TAR).write_bytes(bytes(data))


def error_page(folder):
    (folder / TAR).write_bytes(b"<html><body>503 Service Unavailable</body></html>")


def empty(folder):
    (folder / TAR).write_bytes(b"")


def missing(folder):
    (folder / TAR).unlink()


def missing_index(folder):
    (folder / TAR.replace("tar", "parquet")).unlink()


def exchanged(folder):
    (folder / TAR).rename(folder / "between")
    (folder / OTHER).rename(folder / TAR)
    (folder / "between").rename(folder / OTHER)


def exchanged_with_their_indexes(folder):
    exchanged(folder)
    one, other = (folder / name.replace("tar", "parquet") for name in (TAR, OTHER))
    one.rename(folder / "between")
    other.rename(one)
    (folder / "between").rename(other)


DAMAGES = [
    at_header,
    in_payload,
    between_members,
    at_sample_boundary,
    bit_in_header,
    bit_in_padding,
    bit_in_payload,
    bit_in_index,
    zeroed_header,
    error_page,
    empty,
    missing,
    missing_index,
    exchanged,
    exchanged_with_their_indexes,
]


def an_epoch(folder):
    """Key -> (pixels, caption) of what training is given in one epoch."""
    dataset = open_dataset(folder)
    plan = Plan(shard_samples=dataset.shards("train").samples, seed=0, global_batch=4, lanes=4)
    found = {}
    steps = plan.steps_per_epoch
    for batch in batches(dataset, "train", plan=plan, seed=0, steps=steps):
        for row, key in enumerate(batch.keys):
            found[key] = batch.pixels[row].clone(), batch.captions[row]
    return found


def same(one, other):
    return one[1] == other[1] and torch.equal(one[0], other[0])


def test_a_whole_data_set_has_no_damage(whole):
    """Nothing is found where nothing is, and the check says how far it is."""
    seen = []
    assert verify(LocalFolder(whole), report=lambda *at: seen.append(at)) == []
    assert seen == [(n, 5) for n in range(1, 6)]
    assert len(an_epoch(whole)) == 20


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damaged_shards_are_found_and_refused(copy, damage):
    """Verify names the shard; training stops at it, whatever the damage."""
    damage(copy)
    damages = verify(LocalFolder(copy))
    assert damages
    assert any(TAR.removesuffix(".tar") in text for text in damages)
    with pytest.raises(DamagedSample, match=r"train-0000[12]"):
        an_epoch(copy)


def test_an_extra_shard_is_found(copy):
    """A tar that no manifest names is found; training, which goes by the manifest, ignores it."""
    shutil.copy(copy / TAR, copy / "train-00009.tar")
    shutil.copy(copy / TAR, copy / "more.tar")
    assert verify(LocalFolder(copy)) == [
        "more.tar: not named in the manifest",
        "train-00009.tar: not named in the manifest",
    ]
    assert len(an_epoch(copy)) == 20


@pytest.mark.parametrize("name", ["manifest.json", "versions"])
def test_every_flipped_bit_of_a_manifest_is_found(copy, name):
    """Whatever bit changes in a manifest or in the version that it stands for, verify finds it."""
    path = copy / name
    path = path if path.is_file() else next(path.iterdir())
    draw = random.Random(1)
    data = path.read_bytes()
    for _ in range(60):
        path.write_bytes(data)
        flip(path, draw.randrange(len(data)), draw.randrange(8))
        assert verify(LocalFolder(copy)), "a flipped bit was not found"


def test_a_manifest_of_another_data_set_is_found(copy, tmp_path):
    """Shards that do not belong to the manifest beside them are found."""
    write(tmp_path / "other", records(20, 6))
    for path in ("manifest.json", "versions"):
        source = tmp_path / "other" / path
        if source.is_dir():
            shutil.rmtree(copy / path)
            shutil.copytree(source, copy / path)
        else:
            shutil.copy(source, copy / path)
    assert any("SHA-256" in damage for damage in verify(LocalFolder(copy)))


def test_a_missing_version_is_found(copy):
    """The manifest of the version itself belongs to the data set."""
    shutil.rmtree(copy / "versions")
    (damage,) = verify(LocalFolder(copy))
    assert damage.startswith("versions/")


def test_random_damage_is_never_trained_on(whole, tmp_path):
    """Of 150 shards with random damage, training gives each sample as it was, or stops."""
    expected = an_epoch(whole)
    draw = random.Random(7)
    stopped = 0
    for number in range(150):
        folder = shutil.copytree(whole, tmp_path / str(number))
        path = folder / draw.choice(sorted(p.name for p in folder.glob("train-*")))
        data = bytearray(path.read_bytes())
        for damage in draw.choices(
            [
                partial(_overwrite, data, draw),
                partial(_remove, data, draw),
                partial(_double, data, draw),
            ],
            k=draw.randint(1, 3),
        ):
            damage()
        path.write_bytes(bytes(data))
        assert verify(LocalFolder(folder)) or bytes(data) == (whole / path.name).read_bytes()
        try:
            found = an_epoch(folder)
        except DamagedSample:
            stopped += 1
            found = {}
        assert all(same(found[key], expected[key]) for key in found)
        assert len(found) in (0, len(expected)), "a sample was skipped in silence"
        shutil.rmtree(folder)
    assert stopped > 100


def _overwrite(data, draw):
    start = draw.randrange(len(data))
    data[start : start + draw.choice((1, 7, 512))] = draw.randbytes(draw.choice((1, 7, 512)))


def _remove(data, draw):
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 512, 1024))]


def _double(data, draw):
    start = draw.randrange(len(data)) // 512 * 512
    data[start:start] = data[start : start + 512]

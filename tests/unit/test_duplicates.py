import numpy as np
from tiny_data import CONFIG, append, picture, record, write

from sdn.config import with_overrides
from sdn.data.dataset import open_dataset
from sdn.data.duplicates import near_digest, pixels_digest, words_digest
from sdn.data.files import LocalFolder
from sdn.data.images import encode
from sdn.data.index import from_parquet
from sdn.data.verification import verify


def copy_of(original, number, split="train", **changes):
    """Another record with the image of `original`."""
    return record(number, split, image=encode(picture(original), "png"), **changes)


def keys_of(folder):
    """Split -> keys."""
    dataset = open_dataset(folder)
    return {
        split: {
            key
            for shard in dataset.shards(split)
            for key in from_parquet((folder / shard.index_name).read_bytes()).keys
        }
        for split in ("train", "validation", "test")
    }


ITEMS = [
    *(record(n) for n in range(6)),
    copy_of(1, 10),  # 1 and 10: the same image twice in training
    copy_of(2, 20, "test"),  # 2 and 20: in training and in the test split
    copy_of(3, 30, "validation"),  # 3 and 30: in training and in validation
    record(40, "test", captions=("number 4 THE 4th, picture 4",)),  # the words of 4
]


def test_duplicates_are_counted_and_stay(tmp_path):
    """By default every record becomes a sample; what came twice is in the manifest."""
    manifest = write(tmp_path, ITEMS)
    assert manifest.duplicates == {
        "pixels, in train": 1,
        "pixels, in validation and train": 1,
        "pixels, in test and train": 1,
        "near, in train": 1,
        "near, in validation and train": 1,
        "near, in test and train": 1,
        "words, in test and train": 1,
    }
    assert manifest.counts == {"train": 7, "validation": 1, "test": 2}
    assert manifest.exclusions == {}


def test_training_gives_way_to_what_is_held_out(tmp_path):
    """With hold-out, training loses the images that validation or test have, and nothing else."""
    manifest = write(tmp_path, ITEMS, with_overrides(CONFIG, {"duplicates": "hold-out"}))
    keys = keys_of(tmp_path)
    assert keys["train"] == {"item-0", "item-1", "item-10", "item-4", "item-5"}
    assert keys["test"] == {"item-20", "item-40"}
    assert keys["validation"] == {"item-30"}
    assert manifest.exclusions == {
        "the same image is in the test split": 1,
        "the same image is in the validation split": 1,
    }
    assert verify(LocalFolder(tmp_path)) == []


def test_drop_keeps_one_of_each_image(tmp_path):
    """With drop, one of several equal images in a split stays; which does not depend on order."""
    config = with_overrides(CONFIG, {"duplicates": "drop"})
    write(tmp_path / "one", ITEMS, config)
    write(tmp_path / "other", ITEMS[::-1], config)
    keys = keys_of(tmp_path / "one")
    assert len(keys["train"] & {"item-1", "item-10"}) == 1
    assert keys["train"] - {"item-1", "item-10"} == {"item-0", "item-4", "item-5"}
    assert keys_of(tmp_path / "other") == keys


def test_captions_with_the_same_words_can_count_as_one(tmp_path):
    """With same=words, training also loses captions that the test split has in another order."""
    config = with_overrides(CONFIG, {"duplicates": "hold-out", "same": "words"})
    manifest = write(tmp_path, ITEMS, config)
    assert keys_of(tmp_path)["train"] == {"item-0", "item-1", "item-10", "item-5"}
    assert manifest.exclusions["the same caption, word for word, is in the test split"] == 1


def test_appended_test_images_give_way_to_shards_that_are_there(tmp_path):
    """A new test image that old training shards hold is left out: those are never rewritten."""
    config = with_overrides(CONFIG, {"duplicates": "hold-out"})
    write(tmp_path, [record(n) for n in range(6)], config)
    manifest = append(tmp_path, [copy_of(2, 20, "test"), record(50, "test")], config)
    assert keys_of(tmp_path)["test"] == {"item-50"}
    assert manifest.exclusions == {"the same image is in the train split": 1}


def test_digests_tell_what_they_are_named_for():
    """Pixels change with any pixel; near survives slight noise; words survive another order."""
    smooth = np.full((32, 32, 3), (250, 120, 60), np.uint8)
    smooth[8:24, 8:24] = (30, 190, 90)
    again = smooth + np.random.default_rng(0).integers(0, 4, smooth.shape, dtype=np.uint8)
    assert pixels_digest(again) != pixels_digest(smooth)
    assert near_digest(again) == near_digest(smooth)
    assert near_digest(picture(1)) != near_digest(picture(2))
    assert words_digest(["A red, big bird"]) == words_digest(["bird: big red a"])
    assert words_digest(["a red bird"]) != words_digest(["a blue bird"])

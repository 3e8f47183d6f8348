import json

import numpy as np
import pytest
from tiny_data import picture, record

from sdn.config import DataConfig
from sdn.data.images import decode, encode
from sdn.data.preparation import Prepared, normalise_caption, prepare
from sdn.data.records import DeadLetter

CONFIG = DataConfig(source="tiny", resolution=32)


def test_sample_holds_image_captions_and_labels():
    """The payloads are what a shard stores; the pixels are those of the encoded image."""
    made = prepare(record(1, captions=("one", "two")), CONFIG)
    assert isinstance(made, Prepared)
    assert (made.key, made.split, made.txt) == ("item-1", "train", b"one")
    assert json.loads(made.json) == {"captions": ["one", "two"], "labels": {"parity": "odd"}}
    assert made.pixels.shape == (32, 32, 3)
    assert made.pixels.dtype == np.uint8
    assert np.array_equal(made.pixels, picture(1))
    assert np.array_equal(decode(made.image, resolution=32, fit="pad"), made.pixels)


def test_equal_records_give_equal_bytes():
    """Nothing but the record and the config goes into a sample."""
    for kind in ("png", "jpg"):
        config = DataConfig(source="tiny", resolution=32, image_format=kind)
        first, second = prepare(record(1), config), prepare(record(1), config)
        assert (first.image, first.txt, first.json) == (second.image, second.txt, second.json)


def test_dead_letter_holds_all_for_a_second_try():
    """Key, place, image and the whole record come with the reason."""
    given = record(1, image=b"no image", where="a/b.png")
    dead = prepare(given, CONFIG)
    assert isinstance(dead, DeadLetter)
    assert (dead.key, dead.where, dead.image) == ("item-1", "a/b.png", b"no image")
    assert dead.record == given
    assert "cannot be decoded" in dead.reason
    assert prepare(record(1, image=b"no image"), CONFIG).where == "tiny"


def test_box_of_the_record_is_used():
    """The fit box cuts by the record's box; without one the record is refused."""
    config = DataConfig(source="tiny", resolution=32, fit="box")
    image = encode(picture(1, 64), "png")
    made = prepare(record(1, image=image, box=(20.0, 10.0, 24.0, 16.0)), config)
    expected = decode(image, resolution=32, fit="box", box=(20.0, 10.0, 24.0, 16.0))
    assert np.array_equal(made.pixels, expected)
    assert not np.array_equal(made.pixels, decode(image, resolution=32, fit="resize"))
    assert prepare(record(1, image=image), config).reason.startswith("no box")


def test_largest_image_is_configured():
    """More pixels than the config allows are refused."""
    config = DataConfig(source="tiny", resolution=32, max_pixels=32 * 32 - 1)
    assert "decompression bomb" in prepare(record(1), config).reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a  red\tbird\r\n", "a red bird"),
        ("e\u0301", "é"),
        ("a\u200bb\ufeff\u202e", "ab"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
        ("a\x00b\x1b[0m", "a b [0m"),
        ("\u3000鳥\u00a0x", "鳥 x"),
        ("a\ud800b", "ab"),
    ],
)
def test_captions_are_normalised(text, expected):
    """NFC, blanks single, no control or invisible characters but those that join letters."""
    assert normalise_caption(text) == expected
    assert normalise_caption(expected) == expected


def test_captions_without_text_are_left_out():
    """Blank captions go; a record with no other is refused."""
    made = prepare(record(1, captions=(" ", "\u200b", "x")), CONFIG)
    assert json.loads(made.json)["captions"] == ["x"]
    dead = prepare(record(1, captions=(" ", "\n\u200b")), CONFIG)
    assert dead.reason == "no caption with any text among its 2"


@pytest.mark.parametrize("key", ["", "a b", "a.b", "a/b", "__a", "x" * 91, "鳥" * 31, "a\n"])
def test_key_that_no_tar_takes_is_refused(key):
    """Such a key becomes a dead letter that shows it."""
    dead = prepare(record(1, key=key), CONFIG)
    assert isinstance(dead, DeadLetter)
    assert "a key has 1 to 90 bytes" in dead.reason


def test_unknown_split_is_refused():
    """A split that does not exist is named."""
    assert "not 'dev'" in prepare(record(1, split="dev"), CONFIG).reason

import pickle
import random

import pytest

from sdn.data.sources.listing import Listing, plain_key


@pytest.fixture
def listing():
    """An empty listing."""
    made = Listing()
    yield made
    made.close()


def listed(paths, size=1000):
    made = Listing()
    try:
        for path in paths:
            made.add(path)
        return [entry for chunk in made.chunks(size) for entry in chunk]
    finally:
        made.close()


PATHS = [
    f"{top}/{number}.{kind}" for top in "abc" for number in range(50) for kind in ("png", "gif")
]


def test_order_and_keys_do_not_depend_on_the_order_of_adding():
    """However the paths come, the entries are the same in the same order."""
    shuffled = PATHS.copy()
    random.Random(0).shuffle(shuffled)
    assert listed(PATHS) == listed(shuffled) == listed(reversed(PATHS))


def test_every_path_comes_once_in_chunks():
    """Chunks of any size hold every path exactly once, in the same order."""
    whole = listed(PATHS)
    assert sorted(entry.path for entry in whole) == sorted(PATHS)
    for size in (1, 7, len(PATHS), len(PATHS) + 1):
        assert listed(PATHS, size) == whole


def test_any_beginning_is_a_fair_draw():
    """The first tenth comes from all folders about alike."""
    paths = [f"{top}/{number}.png" for top in "abcd" for number in range(500)]
    counts = [sum(entry.path[0] == top for entry in listed(paths)[:200]) for top in "abcd"]
    assert all(30 <= count <= 70 for count in counts)


def test_order_of_the_rest_does_not_change_with_more_paths():
    """More paths come between the others and leave their order and keys as they are."""
    few = listed(PATHS[::2])
    many = [entry for entry in listed([*PATHS, "d/new.png"]) if entry.path in set(PATHS[::2])]
    assert [entry.path for entry in few] == [entry.path for entry in many]


def test_keys_are_unique():
    """Paths that would share a key get a hash each, all of them."""
    paths = ["a/b.png", "a-b.png", "a-b.jpg", "a b.png", "a_b.png", "c.png", "__c.png", "é.png"]
    keys = {entry.path: entry.key for entry in listed(paths)}
    assert len(set(keys.values())) == len(paths)
    assert keys["é.png"] == "é"
    assert all(len(keys[path]) == len("a-b-") + 16 for path in paths[:5])


def test_name_that_imitates_a_hash_does_not_take_the_key():
    """A path named as another's key with its hash has a key of its own."""
    taken = {entry.path: entry.key for entry in listed(["a.png", "a.jpg"])}["a.png"]
    keys = [entry.key for entry in listed(["a.png", "a.jpg", f"{taken}.png"])]
    assert len(set(keys)) == 3


def test_keys_fit_into_a_tar():
    """Long paths, whichever bytes a character takes, give keys of 90 bytes at most."""
    paths = [f"{'x' * 200}.png", f"{'鳥' * 80}.png", f"a{'鳥' * 80}.png", f"{'鳥' * 80}.jpg"]
    for entry in listed(paths):
        assert 0 < len(entry.key.encode()) <= 90
    assert plain_key("") == plain_key(".") == plain_key("__") == "image"


def test_path_is_added_once(listing):
    """The second adding of a path changes nothing and says so."""
    assert listing.add("a.png", number=1)
    assert not listing.add("a.png", number=2)
    assert listing.get("a.png") == {"number": 1}
    assert len(listing) == 1


def test_notes_are_kept(listing):
    """What is noted comes back, by path and in the entries; an unknown path has nothing."""
    listing.add("sub/a.png", key_from="b.png", captions=["ü"], split=None)
    listing.note("sub/a.png", captions=["ü", "x"], split="test")
    assert listing.get("sub/a.png") == {"captions": ["ü", "x"], "split": "test"}
    assert listing.get("b.png") is None
    (entry,) = listing
    assert (entry.path, entry.key) == ("sub/a.png", "b")
    assert pickle.loads(pickle.dumps(entry)) == entry


def test_names_that_are_not_utf8_come_back(listing):
    """Bytes that are no UTF-8 survive the listing, and are no part of a key."""
    listing.add("gr\udcfcn.png")
    (entry,) = listing
    assert (entry.path, entry.key) == ("gr\udcfcn.png", "gr_n")
    assert listing.get("gr\udcfcn.png") == {}


def test_cases_are_kept_apart(listing):
    """A.png and a.png are two files with two keys."""
    listing.add("A.png")
    listing.add("a.png")
    assert sorted(entry.key for entry in listing) == ["A", "a"]

import pytest
from tiny_data import CONFIG, append, record, records, write

from sdn.config import with_overrides
from sdn.data.claims import undo
from sdn.data.dataset import open_dataset
from sdn.data.files import LocalFolder
from sdn.data.history import difference
from sdn.data.manifest import read_manifest, read_versions
from sdn.data.verification import verify


def test_versions_are_listed_newest_first(tmp_path):
    """Every version names its parent, down to the first."""
    one = write(tmp_path)
    two = append(tmp_path, [record(40)])
    three = append(tmp_path, [record(41, "test")])
    assert read_versions(LocalFolder(tmp_path)) == [three, two, one]
    assert [m.parent for m in (three, two, one)] == [two.digest, one.digest, None]


def test_difference_of_two_versions(tmp_path):
    """What came is counted by split and named; nothing of an older version is gone."""
    one = write(tmp_path)
    append(tmp_path, [record(40), record(41, "test"), record(3, captions=("mended",))])
    found = difference(open_dataset(tmp_path, one.digest), open_dataset(tmp_path))
    assert found.counts["came"] == {"train": 2, "validation": 0, "test": 1}
    assert found.keys["came"][0] == "item-41"
    assert "item-40" in found.keys["came"]
    assert found.counts["gone"] == found.counts["changed"]
    assert sum(found.counts["gone"].values()) == 0
    assert found.shards == {"train": (4, 5), "validation": (0, 0), "test": (1, 2)}
    assert found.preparation == {}


def test_difference_of_two_data_sets(tmp_path):
    """Two preparations are compared by key and content: what is gone, changed, prepared anew."""
    write(tmp_path / "a", records(5, 1))
    changed = [record(0, captions=("other",)), *records(5, 1)[1:4], record(9)]
    jpg = with_overrides(CONFIG, {"image_format": "jpg"})
    write(tmp_path / "b", changed, jpg)
    found = difference(open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b"))
    assert found.keys == {"came": ["item-9"], "gone": ["item-5", "item-4"], "changed": ["item-0"]}
    assert found.preparation == {"image_format": ("png", "jpg")}


def test_unknown_versions_are_refused(tmp_path):
    """A version that does not exist is refused with those that do."""
    one = write(tmp_path)
    with pytest.raises(ValueError, match=f"not one of the versions .*{one.digest[:12]}"):
        read_manifest(LocalFolder(tmp_path), "ffff" if one.digest[0] != "f" else "0000")


def test_undo_takes_the_newest_version_away(tmp_path):
    """After an undo every file is what it was before the append; the first version stays."""
    write(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    append(tmp_path, [record(40), record(41, "test")])
    gone, newest = undo(LocalFolder(tmp_path))
    assert (gone.number, newest.number) == (2, 1)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    with pytest.raises(ValueError, match="one version only"):
        undo(LocalFolder(tmp_path))


def test_an_undo_that_was_cut_off_is_gone_on_with(tmp_path, monkeypatch):
    """Ended after the new head, what is left is no stray: the next append clears it."""
    write(tmp_path)
    append(tmp_path, [record(40)])

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sdn.data.claims.clear", crash)
        with pytest.raises(KeyboardInterrupt):
            undo(LocalFolder(tmp_path))
    again = append(tmp_path, [record(50)])
    assert again.number == 2
    assert verify(LocalFolder(tmp_path)) == []

import json
from dataclasses import replace

import pytest
from tiny_data import CONFIG, Given, append, given, picture, record, records, write, writing

from sdn.config import with_overrides
from sdn.data.dead_letters import read_list
from sdn.data.files import LocalFolder
from sdn.data.images import encode
from sdn.data.manifest import read_manifest
from sdn.data.records import DeadLetter
from sdn.data.retrying import retry_dead_letters
from sdn.data.verification import verify

LENIENT = with_overrides(CONFIG, {"failure_budget": "0.9"})
SMALL = with_overrides(CONFIG, {"failure_budget": "0.9", "max_pixels": "1000"})


def letters_of(folder):
    files = LocalFolder(folder)
    return list(read_list(files, read_manifest(files).dead_letter_file))


def test_a_fix_of_the_settings_mends_from_the_originals(tmp_path):
    """What was refused as too large is prepared from its kept original once it is allowed."""
    small = [record(n, image=encode(picture(n, 20), "png")) for n in range(5)]
    write(tmp_path, [*small, record(50)], SMALL)  # 50 has 1,024 pixels
    (letter,) = letters_of(tmp_path)
    assert "bomb" in letter.reason
    second = retry_dead_letters(LocalFolder(tmp_path), writing(LENIENT), None)
    assert second.samples("train") == 6
    assert second.dead_letters == 0


def test_retry_from_kept_originals(tmp_path):
    """Only what failed before is tried; what succeeds becomes a new version."""
    bad = record(50, image=b"no image"), record(51, captions=("",))
    write(tmp_path, [*records(), *bad], LENIENT)
    files = LocalFolder(tmp_path)
    assert retry_dead_letters(files, writing(LENIENT), None) is None
    letter = next(x for x in letters_of(tmp_path) if x.key == "item-50")
    (tmp_path / letter.original).write_bytes(record(50).image)
    second = retry_dead_letters(files, writing(LENIENT), None)
    assert second.number == 2
    assert second.samples("train") == 18
    assert [x.key for x in letters_of(tmp_path)] == ["item-51"]
    assert verify(files) == []


def test_retry_from_a_mended_source(tmp_path):
    """Of the source as it is now, dead letters alone are looked up; new records stay for later."""
    broken = DeadLetter(key="item-60", where="b.tar:item-60.jpg", reason="cut off")
    write(tmp_path, [*records(), record(50, image=b""), broken], LENIENT)
    mended = [
        *records(),
        record(50),
        replace(record(60), where="b.tar:item-60.jpg"),
        record(70),
    ]
    files = LocalFolder(tmp_path)
    second = retry_dead_letters(files, writing(LENIENT), given(mended))
    assert second.samples("train") == 19
    assert second.dead_letters == 0
    assert append(tmp_path, mended, LENIENT).samples("train") == 20
    assert verify(files) == []


def test_retry_of_a_whole_file(tmp_path):
    """A dead letter that stands for a file brings back every record in that file."""
    torn = DeadLetter(key="shard-7", where="shard-7.tar", reason="ends without its end mark")
    write(tmp_path, [*records(), torn], LENIENT)
    found = [replace(record(n), where=f"shard-7.tar:item-{n}.jpg") for n in range(80, 83)]
    source = [Given(tuple(found)), Given((record(90),))]
    second = retry_dead_letters(LocalFolder(tmp_path), writing(LENIENT), source)
    assert second.samples("train") == 20


def test_letters_without_hope_stay(tmp_path):
    """A retry in which everything fails again is no error, and changes nothing."""
    write(tmp_path, [*records(), record(50, image=b"")], LENIENT)
    before = (tmp_path / "manifest.json").read_bytes()
    assert retry_dead_letters(LocalFolder(tmp_path), writing(CONFIG), None) is None
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_appending_the_mended_source_clears_the_letter(tmp_path):
    """A plain append of the mended source ends the dead letter, too."""
    write(tmp_path, [*records(), record(50, image=b"")], LENIENT)
    second = append(tmp_path, [*records(), record(50)], LENIENT)
    assert second.dead_letters == 0
    assert letters_of(tmp_path) == []


def test_old_letters_are_carried_along(tmp_path):
    """A version lists what failed in earlier ones as long as nobody has mended it."""
    write(tmp_path, [*records(), record(50, image=b"")], LENIENT)
    second = append(tmp_path, [record(51, image=b"?"), record(52)], LENIENT)
    assert second.dead_letters == 2
    assert [x.key for x in letters_of(tmp_path)] == ["item-50", "item-51"]


def test_a_damaged_list_is_refused_and_found(tmp_path):
    """A changed list of dead letters is not believed; verify names it, and a lost original."""
    write(tmp_path, [*records(), record(50, image=b"")], LENIENT)
    listed = tmp_path / "dead-letters" / "0001.jsonl"
    whole = listed.read_bytes()
    listed.write_bytes(whole.replace(b"item-50", b"item-51"))
    with pytest.raises(ValueError, match=r"0001\.jsonl is damaged"):
        letters_of(tmp_path)
    (damage,) = verify(LocalFolder(tmp_path))
    assert "0001.jsonl" in damage
    listed.write_bytes(whole)
    (tmp_path / json.loads(whole)["original"]).unlink()
    (damage,) = verify(LocalFolder(tmp_path))
    assert "the original of dead letter item-50" in damage

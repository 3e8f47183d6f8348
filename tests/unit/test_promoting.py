"""A version becomes the champion through the gate, or over it with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from registered_versions import aliases, registered
from tiny_data import append, record, write
from typer.testing import CliRunner

from pipelines import notifying, promoting
from pipelines.cli import app
from pipelines.flows import opening
from pipelines.flows.rollback import rollback
from pipelines.generation import FoundModel
from pipelines.promoting import open_promotion, promote
from pipelines.registry import MANIFEST, DamagedModelError, RegistryError
from pipelines.release import COMPARED, DECISION
from pipelines.rolling_back import roll_back
from pipelines.run import Done
from pipelines.settings import Settings
from pipelines.store import StoreError
from pipelines.succession import FORCED, ROLLED_BACK, Succession
from sdn.config import DataConfig
from sdn.data.files import LocalFolder
from sdn.data.manifest import read_versions
from sdn.evaluation import UNTRAINED

GAIN = {"value": 0.1, "low": 0.05, "high": 0.15, "count": 9, "interval": "x", "withheld": ""}


def done(name, result):
    return Done(name=name, key=f"key of {name}", folder=name, result=result, seconds=1, fresh=True)


class Place:
    """A registry with versions 1 to 3, version 1 the champion, and a gate that says what is set."""

    def __init__(self, folder, name, monkeypatch):
        self.client, self.name = registered(folder, versions=3, name=name), name
        self.succession = Succession(self.client, name)
        self.succession.succeed("1", lambda _: (True, "the first"))
        self.settings = Settings(store=str(folder))
        self.better, self.fails, self.asked, self.manifest = True, None, [], "m"
        self.meanwhile = lambda: None
        self.data, self.told = DataConfig(source="openmoji", path=None), []
        monkeypatch.setattr(notifying, "notify", lambda *said, key: self.told.append(said[1:3]))
        monkeypatch.setattr(promoting, "score", self.score)

    def score(self, *_):
        if self.fails:
            raise self.fails
        return SimpleNamespace(
            inputs={"data": done("prepare", {"manifest": self.manifest})}, against=self.against
        )

    def against(self, champion, _do):
        self.asked.append(champion.title)
        self.meanwhile()
        reason = f"{'better' if self.better else 'not better'} than {champion.title}"
        kid = {"gain": GAIN, "p_value": 0.01, "needed": 5, "error": 0.01}
        decision = {"promoted": self.better, "reason": reason, "kid": kid, "match": None}
        return done("compare", {"champion": champion.title, "decision": decision})

    def promote(self, version, **how):
        found = FoundModel(
            folder=None,
            name=self.name,
            version=str(version),
            uri=f"models:/{self.name}/{version}",
            sha256="",
        )
        run = SimpleNamespace(
            settings=self.settings,
            config=SimpleNamespace(data=self.data),
            store=SimpleNamespace(fetch=lambda folder: self.settings.local / folder),
        )
        return promote(SimpleNamespace(found=found, run=run), **how)

    def aliases(self):
        return aliases(self.client, self.name)

    def tags(self, version):
        return self.client.get_model_version(self.name, str(version)).tags


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """One database for all: making it takes longer than all that is done in it."""
    return tmp_path_factory.mktemp("registry")


@pytest.fixture
def place(registry, request, monkeypatch):
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return Place(registry, f"sdn-{name}", monkeypatch)


def test_a_better_version_passes_the_gate(place):
    """It is compared with the champion, takes over, and the tags say with what numbers."""
    found = place.promote(2)
    assert (found["champion"], found["before"], found["forced"]) == (True, "1", False)
    assert place.asked == ["version 1"]
    assert place.aliases() == {"champion": "2", "previous": "1"}
    decision = json.loads(place.tags(2)[DECISION])
    assert (decision["promoted"], decision["kid"]["p_value"]) == (True, 0.01)
    assert json.loads(place.tags(2)[COMPARED])["version"] == "1"
    assert FORCED not in place.tags(2)
    assert found["report"].endswith("report.html")
    assert place.told == [("promotion", f"{place.name} version 2 is champion")]


def test_one_that_is_not_better_does_not(place):
    """The champion stays, and the answer says how a person overrules that."""
    place.better = False
    found = place.promote(2)
    assert not found["champion"]
    assert found["reason"].startswith("not better than version 1. With force and a reason")
    assert place.aliases() == {"champion": "1"}
    assert json.loads(place.tags(2)[DECISION])["promoted"] is False
    assert place.told == [("rejection", f"{place.name} version 2 is not promoted")]


def test_a_person_overrules_the_gate_with_a_reason(place):
    """The term and the tags say that it was overruled, by what, and what the gate had said."""
    place.better = False
    found = place.promote(2, force=True, reason="nicer hands")
    assert (found["champion"], found["forced"]) == (True, True)
    (_, term) = place.succession.terms()
    assert (term.champion, term.previous, term.forced) == ("2", "1", True)
    assert term.why == "nicer hands (by hand; the gate: not better than version 1)"
    assert place.tags(2)[FORCED] == f"{term.at} {term.why}"
    decision = json.loads(place.tags(2)[DECISION])
    assert (decision["promoted"], decision["forced"]) == (True, True)
    assert decision["kid"]["p_value"] == 0.01
    assert place.aliases() == {"champion": "2", "previous": "1"}


def test_versions_of_one_data_set_are_compared_without_a_note(place, tmp_path):
    """A sample has one split in all of them; of a champion of other data that is not known."""
    write(tmp_path / "set")
    append(tmp_path / "set", [record(n) for n in range(100, 103)])
    newest, first = read_versions(LocalFolder(tmp_path / "set"))
    place.manifest = first.digest
    place.data = DataConfig(source="shards", path=str(tmp_path / "set"))
    place.better = False
    for manifest, note in ((newest.digest, False), ("f" * 64, True)):
        place.client.set_model_version_tag(place.name, "1", MANIFEST, manifest)
        place.promote(2)
        found = json.loads(place.tags(2)[COMPARED])["note"]
        assert ("another version of the data" in found) is note


@pytest.mark.parametrize("reason", ["", "  "])
def test_no_reason_no_force(place, reason):
    """Nothing is compared and nothing changed."""
    with pytest.raises(ValueError, match="say why"):
        place.promote(2, force=True, reason=reason)
    assert place.asked == []
    assert len(place.succession.terms()) == 1


@pytest.mark.parametrize("error", [StoreError("no such stage"), FileNotFoundError("config.json")])
def test_a_gate_that_cannot_be_asked_can_be_overruled(place, error):
    """Without force that is an error; with it, it is kept that nothing was compared."""
    place.fails = error
    with pytest.raises(type(error)):
        place.promote(2)
    assert len(place.succession.terms()) == 1
    found = place.promote(2, force=True, reason="the store is gone")
    assert (found["champion"], found["compared_with"], found["report"]) == (True, None, None)
    assert "could not be asked" in place.succession.terms()[-1].why
    assert json.loads(place.tags(2)[DECISION])["kid"] is None


def test_the_champion_stays_the_champion(place):
    """Asked for once more, nothing is compared, claimed or written."""
    for how in ({}, {"force": True, "reason": "sure"}):
        found = place.promote(1, **how)
        assert (found["champion"], found["reason"]) == (True, "already the champion")
        assert not found["forced"]
    assert place.asked == []
    assert len(place.succession.terms()) == 1
    assert DECISION not in place.tags(1)
    assert place.told == []


def test_what_was_rolled_back_from_comes_back_by_force_alone(place):
    """The gate is not even asked; a person may, and the tag of the rollback goes."""
    place.promote(2)
    roll_back(place.settings, place.name, "drew nothing")
    assert ROLLED_BACK in place.tags(2)
    found = place.promote(2)
    assert not found["champion"]
    assert "was rolled back from" in found["reason"]
    assert len(place.asked) == 1
    place.promote(2, force=True, reason="it was the data")
    assert place.aliases() == {"champion": "2", "previous": "1"}
    assert ROLLED_BACK not in place.tags(2)


def test_a_forced_promotion_is_undone_by_a_rollback(place):
    """As any other."""
    place.promote(2, force=True, reason="nicer hands")
    assert roll_back(place.settings, place.name, "no")["after"] == "1"
    assert place.aliases() == {"champion": "1", "previous": "2"}


def test_nobody_overrules_a_champion_they_did_not_know_of(place):
    """Where another version took over in the meantime, the person is asked again."""
    place.meanwhile = lambda: place.succession.succeed("3", lambda _: (True, "better"))
    with pytest.raises(RegistryError, match=r"version 3 .* in the meantime .*nothing was promoted"):
        place.promote(2, force=True, reason="nicer hands")
    assert place.aliases()["champion"] == "3"
    assert FORCED not in place.tags(2)


def test_a_champion_that_was_deleted_is_not_compared_with(place):
    """Then untrained weights are what a version must beat."""
    place.client.delete_model_version(place.name, "1")
    assert place.promote(2)["champion"]
    assert place.asked == [UNTRAINED]


def test_the_files_are_checked_first(place, registry):
    """A damaged version is refused before anything is compared."""
    source = place.client.get_model_version(place.name, "2").source
    for path in Path(source.removeprefix("file://")).rglob("student.safetensors"):
        path.write_bytes(b"damaged")
    with pytest.raises(DamagedModelError, match="is damaged"):
        open_promotion(place.name, 2, str(registry))
    assert len(place.succession.terms()) == 1


def test_the_command_says_what_is_missing(tmp_path):
    """No registry: one line, nothing made."""
    found = CliRunner().invoke(app, ["promote", "2", "--store", str(tmp_path / "store")])
    assert found.exit_code == 1
    assert "nothing is registered" in found.stderr
    assert not (tmp_path / "store").exists()


def test_a_rollback_that_cannot_be_is_shown_first(tmp_path, monkeypatch):
    """Nothing is registered: the first artifact says so, and what was asked for."""
    shown = []
    monkeypatch.setattr(opening, "show_refusal", lambda asked, why: shown.append((asked, why)))
    with pytest.raises(RegistryError, match="nothing is registered"):
        rollback.fn(reason="worse", store=str(tmp_path / "store"))
    ((asked, why),) = shown
    assert asked == {"model": "", "reason": "worse", "store": str(tmp_path / "store")}
    assert "nothing is registered" in why

"""Retraining: what it goes on from, when it is due, and what is told of each way it can end."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from tiny_data import append, record, write

from pipelines import newcomers, retraining, work
from pipelines.flows import growing as module
from pipelines.flows.retrain import retrain
from pipelines.ingesting import Ingested, LandingError, only_one
from pipelines.reasons import TrainingError
from pipelines.registry import MANIFEST, RegistryError
from pipelines.release import DECISION, PARENT
from pipelines.retraining import Parent
from pipelines.run import Done, RunSpec
from pipelines.store import StoreError
from sdn.config import with_overrides
from sdn.data.files import LocalFolder
from sdn.data.landing import Waiting
from sdn.data.manifest import read_versions
from sdn.recipes import recipe


def done(name, result=None, key=None):
    key = key or f"key of {name}"
    return Done(name=name, key=key, folder=name, result=result or {}, seconds=1, fresh=False)


def parent_on(manifest, **changes):
    data = done("prepare", {"manifest": manifest, "place": "/somewhere/set"})
    values = {
        "name": "sdn-tiny",
        "version": "1",
        "config": recipe("tiny"),
        "start": done("stage_two"),
        "taught": done("teacher", {"sha256": "t"}),
        "encoder": done("captions"),
        "data": data,
        "fixed": data,
    }
    return Parent(**(values | changes))


@pytest.fixture
def versions(tmp_path):
    """Three versions of a data set, the newest first: 17, 20 and 25 training samples."""
    folder = tmp_path / "set"
    write(folder)
    append(folder, [record(n) for n in range(100, 103)])
    append(folder, [record(n) for n in range(200, 205)])
    return read_versions(LocalFolder(folder))


@pytest.fixture
def run(tmp_path, monkeypatch):
    for name in ("SDN_LANDING", "SDN_DATASET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "create_markdown_artifact", lambda *args, **values: None)
    monkeypatch.setenv("SDN_CACHE", str(tmp_path / "cache"))
    return RunSpec("tiny", {}, str(tmp_path / "store")).open()


def wanted(**changes):
    values = {
        "landing": "/landing", "dataset": "/set", "source": "recipe", "min_new": 4,
        "settle_s": 1, "quiet_s": 0, "epochs": None, "rate": None,
    }  # fmt: skip
    return module.Wanted(**(values | changes))


def test_what_came_is_counted_from_the_last_data_trained_on(versions):
    """A rejected model's data count as trained on: the next attempt needs as much again."""
    newest, second, first = versions
    assert retraining.came_for(parent_on(first.digest), set(), versions) == 8
    assert retraining.came_for(parent_on(first.digest), {second.digest}, versions) == 5
    assert retraining.came_for(parent_on(newest.digest), {second.digest}, versions) == 0


def test_a_champion_of_other_data_is_not_gone_on_from(versions):
    """Its test images might be training images here; the text says which data set may grow."""
    with pytest.raises(LandingError, match=r"trained on no version.*/somewhere/set"):
        retraining.came_for(parent_on("f" * 64), set(), versions)


def test_the_config_is_the_champions_with_another_stage_two(run, versions):
    """A quarter of the recipe's length at three tenths of its rate, or what is asked for."""
    changed = dataclasses.replace(recipe("tiny").stage_two, clip=7.0, epochs=99, rate=0.5)
    parent = parent_on("m", config=dataclasses.replace(recipe("tiny"), stage_two=changed))
    found = retraining.retrained(run, parent, "/set", versions[0], None, None)
    own = recipe("tiny").stage_two
    assert found.stage_two.clip == 7.0
    assert found.stage_two.epochs == own.epochs / 4
    assert found.stage_two.rate == pytest.approx(own.rate * 0.3)
    assert (found.data.source, found.data.path) == ("shards", "/set")
    asked = retraining.retrained(run, parent, "/set", versions[0], 2.5, 1e-5)
    assert (asked.stage_two.epochs, asked.stage_two.rate) == (2.5, 1e-5)


def with_third(epochs, two=12.0):
    """The config of a champion whose last stage is stage three."""
    changes = {"stage_three.epochs": str(epochs), "stage_two.epochs": str(two)}
    return with_overrides(recipe("tiny"), changes | {"student.noise": "4"})


def test_a_champion_with_a_stage_three_goes_on_with_that_alone(run, tmp_path, versions):
    """Distances alone would undo what critics taught, whatever the recipe of the run has."""
    own = RunSpec("tiny", {"stage_three.epochs": "8", "student.noise": "4"}, str(tmp_path)).open()
    for at, champion, length in (
        (own, with_third(6), 2),  # a quarter of the recipe's 8
        (run, with_third(6), 1.5),  # the recipe has none: of the champion's own
        (run, with_third(1.5, two=0.0), 1.5),  # which was retrained, and has a share already
    ):
        parent = parent_on("m", config=champion)
        found = retraining.retrained(at, parent, "/set", versions[0], None, None)
        assert (found.stage_two.epochs, found.stage_three.epochs) == (0, length)
        asked = retraining.retrained(at, parent, "/set", versions[0], 2.5, 1e-5)
        assert (asked.stage_two.epochs, asked.stage_three.epochs) == (0, 2.5)
        assert asked.stage_three.rate == 1e-5


def test_a_champion_without_a_stage_three_gets_one_only_when_asked(tmp_path, versions):
    """A recipe that has one now does not give it critics; a change of this run does."""
    changes = {"stage_three.epochs": "8"}
    run = RunSpec("tiny", changes, str(tmp_path)).open()
    found = retraining.retrained(run, parent_on("m"), "/set", versions[0], None, None)
    assert (found.stage_two.epochs, found.stage_three.epochs) == (3, 2)
    run = dataclasses.replace(run, spec=dataclasses.replace(run.spec, overrides={}))
    found = retraining.retrained(run, parent_on("m"), "/set", versions[0], None, None)
    assert (found.stage_two.epochs, found.stage_three.epochs) == (3, 0)


def test_only_changes_about_a_retraining_are_heeded(tmp_path, versions):
    """Teacher and captions are the champion's, whatever the changes of a first model say."""
    changes = {"promotion.level": "0.1", "teacher.epochs": "77", "captions.epochs": "78"}
    run = RunSpec("tiny", changes, str(tmp_path)).open()
    found = retraining.retrained(run, parent_on("m"), "/set", versions[0], None, None)
    assert found.promotion.level == 0.1
    assert (found.teacher, found.captions) == (recipe("tiny").teacher, recipe("tiny").captions)


def test_the_stages_key_is_of_all_that_it_goes_on_from(run, versions):
    """Same inputs, same key, so that a retried run goes on; any other input is another stage."""

    def key(manifest="m", start="s", teacher="t", captions="c", epochs=1.0):
        parent = parent_on("m")
        config = retraining.retrained(run, parent, "/set", versions[0], epochs, None)
        inputs = {
            "data": done("prepare", {"manifest": manifest}),
            "teacher": done("teacher", key=teacher),
            "captions": done("captions", key=captions),
            "start": done("stage_two", key=start),
        }
        at = dataclasses.replace(run, config=config)
        return work.distil(at, "stage_two", inputs).stage.key

    others = [key(manifest="n"), key(start="u"), key(teacher="v"), key(captions="w"), key(epochs=2)]
    assert key() == key()
    assert len({key(), *others}) == 6


def test_what_was_begun_is_gone_on_with(run, versions):
    """A run that was cut off is finished on its data, even if more came; decided, it is over."""
    parent = parent_on(versions[2].digest)
    assert retraining.begun(run, parent, versions) is None
    retraining.begin(run, parent, versions[1])
    assert retraining.begun(run, parent, versions) == versions[1]
    assert retraining.begun(run, parent_on("m", version="2"), versions) is None
    assert retraining.begun(run, parent, versions[2:]) is None
    retraining.end(run, parent)
    assert retraining.begun(run, parent, versions) is None


@pytest.fixture
def champion(monkeypatch, versions):
    """The champion was trained on the first version; nothing was tried since."""
    parent = parent_on(versions[2].digest)
    tried = set()
    monkeypatch.setattr(retraining, "find_parent", lambda run: parent)
    monkeypatch.setattr(retraining, "tried", lambda settings, parent: tried)
    return SimpleNamespace(parent=parent, tried=tried)


def test_when_a_retraining_is_due(run, versions, champion):
    """Enough new samples, or an attempt that was cut off; too few, or a decided one, is not."""
    assert module.due(run, wanted(min_new=8), versions) == (champion.parent, versions[0], 8)
    assert module.due(run, wanted(min_new=9), versions) == (champion.parent, None, 8)
    retraining.begin(run, champion.parent, versions[1])
    assert module.due(run, wanted(min_new=9), versions)[1] == versions[1]
    champion.tried.add(versions[1].digest)
    assert module.due(run, wanted(min_new=9), versions)[1] is None


def test_a_first_model_is_due_when_there_is_enough(run, versions, monkeypatch):
    """Without a champion the whole data set is new."""
    monkeypatch.setattr(retraining, "find_parent", lambda run: None)
    monkeypatch.setattr(retraining, "versions_of", lambda *_: [])
    assert module.due(run, wanted(min_new=25), versions) == (None, versions[0], 25)
    assert module.due(run, wanted(min_new=26), versions) == (None, None, 25)


def test_a_first_model_that_was_not_promoted_is_not_trained_again_for_each_image(
    run, versions, monkeypatch
):
    """Without a champion, what came counts since the newest data that any model was decided on."""
    decided = {DECISION: "{}", PARENT: "1"}
    there = [{DECISION: "{}", MANIFEST: versions[1].digest}, {MANIFEST: versions[0].digest}]
    there += [decided, decided | {MANIFEST: "another data set's"}]
    asked = []

    def found(settings, condition):
        asked.append(condition)
        return [SimpleNamespace(tags=tags) for tags in there]

    monkeypatch.setattr(retraining, "find_parent", lambda run: None)
    monkeypatch.setattr(retraining, "versions_of", found)
    assert module.due(run, wanted(min_new=5), versions) == (None, versions[0], 5)
    assert module.due(run, wanted(min_new=6), versions) == (None, None, 5)
    assert set(asked) == {"name = 'sdn-tiny'"}
    looks = Looks(monkeypatch, versions, [2])
    looks._last = versions[1]
    state = module.retrain_alone(run, wanted(min_new=1))
    assert state.name == "NothingNew"
    assert "0 of 1 new training samples" in state.message


def test_without_mlflow_what_arrived_is_kept(run, versions, monkeypatch):
    """The error says which version it is, and that the next run goes on."""

    def away(run):
        raise RegistryError("MLflow cannot be asked")

    monkeypatch.setattr(retraining, "find_parent", away)
    with pytest.raises(RegistryError, match="version 3 of /set: nothing is lost"):
        module.due(run, wanted(), versions)


def test_a_version_registered_by_other_means_is_refused(run):
    """Without the keys of its stages nothing can go on from it; without the stages neither."""
    with pytest.raises(RegistryError, match="did not register it"):
        retraining.stages_of(run.store, "sdn-tiny version 1", {"sdn.key.teacher": "k"})
    tags = {f"sdn.key.{name}": "0" * 64 for name in retraining._NEEDED}
    with pytest.raises(StoreError, match="which made sdn-tiny version 1"):
        retraining.stages_of(run.store, "sdn-tiny version 1", tags)


class Looks:
    """A landing place whose looks give these versions, one after another."""

    def __init__(self, monkeypatch, versions, numbers):
        self.slept = []
        self._versions, self._numbers, self._last = versions, list(numbers), None
        monkeypatch.setattr(module, "look", self.look)
        monkeypatch.setattr(module, "place", lambda *_: None)
        monkeypatch.setattr(module, "read_versions", self.there)
        monkeypatch.setattr(module.time, "sleep", self.slept.append)

    def look(self, *_):
        before = self._last
        number = self._numbers.pop(0)
        self._last = number and self._versions[-number]
        waiting = (Waiting("a.png", "no caption yet"),)
        return Ingested(
            landing="/landing", dataset="/set", before=before, manifest=self._last or None,
            new=1, waiting=waiting, waiting_count=1,
        )  # fmt: skip

    def there(self, _):
        return self._versions[-self._last.number :]


def test_nothing_has_arrived_at_all(run, versions, monkeypatch):
    """An empty landing place: the run says so, and what waits there."""
    Looks(monkeypatch, versions, [0])
    found = module.retrain_alone(run, wanted())
    assert found.name == "NothingNew"
    assert found.message == (
        "nothing has arrived at /landing; 1 files wait, such as a.png (no caption yet)"
    )


def test_too_little_has_arrived(run, versions, champion, monkeypatch):
    """It is in the data set, and waits for more; the next look finds nothing new."""
    looks = Looks(monkeypatch, versions, [2])
    found = module.retrain_alone(run, wanted(quiet_s=60))
    assert found.name == "Waiting"
    assert "3 of 4 new training samples" in found.message
    assert looks.slept == []
    looks = Looks(monkeypatch, versions, [2])
    looks._last = versions[1]
    found = module.retrain_alone(run, wanted(quiet_s=60))
    assert found.name == "NothingNew"
    assert found.message.startswith("nothing new at /landing; 3 of 4")


def test_a_retraining_begins_when_nothing_more_comes(run, versions, champion, monkeypatch):
    """While versions keep coming it waits, and then trains on the newest, once."""
    looks = Looks(monkeypatch, versions, [2, 3, 3])
    trained = []

    def retrain_from(run, wanted, parent, manifest, found):
        trained.append((parent, manifest))
        return module.told("Promoted", "better")

    monkeypatch.setattr(module, "retrain_from", retrain_from)
    found = module.retrain_alone(run, wanted(min_new=3, quiet_s=60))
    assert found.name == "Promoted"
    assert trained == [(champion.parent, versions[0])]
    assert looks.slept == [60, 60]


@pytest.mark.parametrize("champion_now", [True, False])
def test_both_outcomes_of_a_retraining(run, versions, champion, monkeypatch, champion_now):
    """Better or not, the name of the state says it, and the attempt is over."""
    registered = {
        "name": "sdn-tiny", "version": "2", "champion": champion_now, "reason": "it was measured",
    }  # fmt: skip
    stages = {"stage_two": done("stage_two")}
    monkeypatch.setattr(module, "train_and_decide", lambda *args: (stages, registered))
    monkeypatch.setattr(module, "show_result", lambda *args: None)
    found = Ingested(
        landing="/landing", dataset="/set", before=None, manifest=versions[0], new=1, waiting=(),
        waiting_count=0,
    )  # fmt: skip
    state = module.retrain_from(run, wanted(), champion.parent, versions[0], found)
    assert state.name == ("Promoted" if champion_now else "Rejected")
    assert "sdn-tiny version 2, trained from version 1 on version 3" in state.message
    assert retraining.begun(run, champion.parent, versions) is None


@pytest.mark.parametrize("error", [TrainingError("its loss is not finite", final=True), OSError()])
def test_an_attempt_that_failed_for_good_is_not_gone_on_with(
    run, versions, champion, monkeypatch, error
):
    """What would come again is given up, so that other data have a chance; the rest goes on."""

    def fail(*args):
        raise error

    monkeypatch.setattr(module, "train_and_decide", fail)
    with pytest.raises(type(error)):
        module.retrain_from(run, wanted(), champion.parent, versions[0], None)
    left = retraining.begun(run, champion.parent, versions)
    assert (left is None) == isinstance(error, TrainingError)


def test_data_that_no_model_can_be_judged_on_wait(run, versions):
    """Four test images cannot show a difference: no first model, and no failure every hour."""
    found = Ingested(
        landing="/landing", dataset="/set", before=None, manifest=versions[0], new=1, waiting=(),
        waiting_count=0,
    )  # fmt: skip
    state = module.first_model(run, wanted(), versions[0], found)
    assert state.name == "Waiting"
    assert "4 test images" in state.message


def test_without_a_landing_place_the_flow_completes(run, tmp_path):
    """A machine that was never told of one has nothing to do, and says what to set."""
    state = retrain.fn(recipe="tiny", store=str(tmp_path / "store"))
    assert (state.type.value, state.name) == ("COMPLETED", "NoLandingPlace")
    assert "SDN_LANDING" in state.message


def test_a_second_run_on_the_same_data_set_ends_at_once(run, tmp_path):
    """While one retrains, another one on the same data set completes without doing anything."""
    store, landing = tmp_path / "store", tmp_path / "landing"
    landing.mkdir()
    with only_one("retraining", str(store / "landed"), run.settings):
        state = retrain.fn(str(landing), recipe="tiny", store=str(store))
    assert (state.type.value, state.name) == ("COMPLETED", "UnderWay")
    assert list(landing.iterdir()) == []


@pytest.mark.parametrize(("p_value", "promoted"), [(0.01, False), (0.5, True)])
def test_worse_on_new_data_is_not_promoted(p_value, promoted):
    """Better on the fixed split is not enough where the new data say the opposite."""
    gain = {"value": -0.1, "low": -0.2, "high": 0.0, "count": 20}
    found = done("evaluate_new", {"images": 20, "gain": gain, "worse_p_value": p_value})
    beside = newcomers.with_a_say(found, 0.025)
    decision = beside.decide({"promoted": True, "reason": "better than version 1"})
    assert decision["promoted"] is promoted
    assert "better than version 1" in decision["reason"]
    assert "20 new test images" in decision["reason"]
    assert decision["new_data"]["worse_p_value"] == p_value
    kept = beside.decide({"promoted": False, "reason": "not better"})
    assert kept["promoted"] is False
    assert kept["reason"].startswith("not better")


def test_new_test_images_are_those_of_later_versions(tmp_path):
    """Only what came since counts, and too few say nothing."""
    from sdn.data.dataset import open_dataset

    folder = tmp_path / "set"
    write(folder)
    first = open_dataset(folder)
    append(folder, [record(n, "test") for n in range(100, 111)])
    assert newcomers.new_test_images(open_dataset(folder), first) is None
    append(folder, [record(200, "test"), record(201)])
    found = newcomers.new_test_images(open_dataset(folder), first)
    assert found.manifest.counts == {"train": 0, "validation": 0, "test": 12}
    assert newcomers.new_test_images(first, open_dataset(folder)) is None


def test_the_form_is_flat_and_described():
    """Every field has a type, a description and a default that the form can show."""
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(retrain.fn).model_dump_for_openapi()["properties"]
    assert all(field["description"] for field in schema.values())
    assert all("$ref" not in str(field) for field in schema.values())
    assert schema["recipe"]["enum"]
    assert schema["source"]["enum"] == ["recipe", "folder", "parquet", "tars"]
    assert schema["min_new"]["minimum"] == 1
    assert schema["settle_s"]["maximum"] == 3600


@pytest.fixture
def shown(monkeypatch):
    """Key -> text of the artifacts of a run of the flow."""
    found = {}
    monkeypatch.setattr(
        module, "create_markdown_artifact", lambda text, key: found.setdefault(key, text)
    )
    return found


def test_changes_that_a_retraining_does_not_heed_are_named_first(tmp_path, shown):
    """The first artifact says which changes do nothing once there is a champion."""
    changes = {"promotion.level": "0.1", "teacher.epochs": "77", "workers": "1"}
    module.show_wanted(RunSpec("tiny", changes, str(tmp_path)).open(), wanted())
    assert shown["resolved-config"].endswith(
        "Changes that do nothing once there is a champion: `teacher.epochs`"
    )
    shown.clear()
    module.show_wanted(RunSpec("tiny", {"workers": "1"}, str(tmp_path)).open(), wanted())
    assert "do nothing" not in shown["resolved-config"]


def test_a_landing_place_that_cannot_be_used_is_shown(tmp_path, shown, monkeypatch):
    """After what was asked for the run shows why it cannot be done."""
    monkeypatch.setenv("SDN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(LandingError, match="there is no landing place"):
        retrain.fn(landing=str(tmp_path / "nowhere"), recipe="tiny", store=str(tmp_path / "store"))
    assert list(shown) == ["resolved-config", "outcome"]
    assert "there is no landing place" in shown["outcome"]

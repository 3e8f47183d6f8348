"""From a model, or an image that it drew, back to its data; and what no longer agrees."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_data
from PIL import Image
from registered_model import NAME, write_small_model
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.digests import folder_digest
from pipelines.generation import draw, find_model, write_images
from pipelines.lineage import drawn_by, trace
from pipelines.registry import CHAMPION, RegistryError
from pipelines.settings import Settings
from pipelines.store import LocalStore
from pipelines.tracking import Tracker
from sdn.sampling import STUDENT

STAGES = ("prepare", "teacher", "captions", "stage_one", "stage_two")
KEYS = {name: f"{number:064x}" for number, name in enumerate(STAGES, start=0xABCDEF << 200)}


@dataclass(frozen=True)
class Place:
    store: LocalStore
    tracker: Tracker
    manifest: str
    uri: str

    def folder(self, stage):
        return self.store.root / folder_of(stage)

    def trace(self, target):
        return trace(str(target), str(self.store.root))


def folder_of(stage):
    return f"stages/{stage}-{KEYS[stage][:16]}"


def publish(store, stage, inputs, result):
    mark = {
        "stage": stage,
        "key": KEYS[stage],
        "config": {"of": stage},
        "inputs": inputs,
        "result": result,
        "seconds": 12.5,
    }
    store.publish(folder_of(stage), mark)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """MLflow's database with nothing in it: making one takes seconds."""
    folder = tmp_path_factory.mktemp("database")
    Tracker(Settings(store=str(folder)), "small").client.search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def place(tmp_path, database):
    """A store with all stages of a run, and its model registered as the champion."""
    store = LocalStore(tmp_path / "store")
    store.root.mkdir()
    shutil.copy(database, store.root)
    manifest = tiny_data.write(store.workspace(folder_of("prepare"))).digest
    publish(store, "prepare", {}, {"manifest": manifest, "place": None})
    inputs: dict[str, Any] = {"data": manifest}
    for role, stage in (("teacher", "teacher"), ("captions", "captions"), ("start", "stage_one")):
        (store.workspace(folder_of(stage)) / "some").write_text(stage)
        publish(store, stage, dict(inputs), {})
        inputs[role] = KEYS[stage]
    model = write_small_model(store.root / folder_of("stage_two"))
    publish(store, "stage_two", inputs, {})
    tracker = Tracker(Settings(store=str(store.root)), "small")
    parent = tracker.run("small", "parent")
    tracker.finish(tracker.run("stage_two", KEYS["stage_two"], parent))
    logged = tracker.settings.local / "logged"
    shutil.copytree(model, logged / "artifacts" / model.name)
    (logged / "MLmodel").write_text("flavors: {}\n")
    tracker.client.create_registered_model(NAME)
    tracker.client.create_model_version(
        NAME,
        source=logged.as_uri(),
        run_id=parent,
        tags={
            **{f"sdn.key.{stage}": key for stage, key in KEYS.items()},
            "sdn.key": "registration",
            "sdn.sha256": folder_digest(model),
            "sdn.manifest": manifest,
            "sdn.code": "0.1.0 abc",
            "sdn.score": "0.5",
        },
    )
    tracker.client.set_registered_model_alias(NAME, CHAMPION, "1")
    return Place(store, tracker, manifest, f"models:/{NAME}/1")


def complete(place, found):
    """Whether the lineage leads from the version to the exact shards."""
    assert found.problems == []
    assert found.unreached == []
    assert found.model["uri"] == place.uri
    assert found.model["aliases"] == [CHAMPION]
    assert found.model["code"] == "0.1.0 abc"
    assert found.decision == {"sdn.score": "0.5"}
    assert {one["name"]: one["key"] for one in found.stages} == KEYS
    assert found.stages[0]["name"] == "stage_two"
    for one in found.stages:
        assert one["config"] == {"of": one["name"]}
        assert one["seconds"] == 12.5
    assert found.data["manifest"] == place.manifest
    assert found.data["samples"] == {"train": 17, "validation": 0, "test": 4}
    assert found.data["source"] == "tiny"
    manifest = json.loads((place.folder("prepare") / "manifest.json").read_text())
    names = [name for segment in manifest["segments"] for name in segment["columns"]["name"]]
    assert sorted(shard["name"] for shard in found.data["shards"]) == sorted(names)
    assert found.data["shard_count"] == len(names)
    assert [run["name"] for run in found.runs] == ["small", "stage_two"]
    return True


@pytest.mark.parametrize("target", [f"models:/{NAME}/1", f"models:/{NAME}@champion", NAME])
def test_from_a_registered_model(place, target):
    """By version, alias or name, everything from the shards to the runs is found and agrees."""
    assert complete(place, place.trace(target))


def test_a_name_without_champion_is_its_newest_version(place):
    """Where no version is the champion, a name means the newest."""
    place.tracker.client.delete_registered_model_alias(NAME, CHAMPION)
    assert place.trace(NAME).model["uri"] == place.uri


def test_a_version_that_says_little(place):
    """Where a version has no tags of stages and data, that is said, not that all agrees."""
    for tag in ("sdn.manifest", *(f"sdn.key.{stage}" for stage in STAGES)):
        place.tracker.client.delete_model_version_tag(NAME, "1", tag)
    found = place.trace(NAME)
    assert (found.problems, found.stages) == ([], [])
    (unreached,) = found.unreached
    assert "has no tags sdn.key.* or sdn.manifest" in unreached
    done = CliRunner().invoke(app, ["lineage", NAME, "--store", str(place.store.root)])
    assert done.exit_code == 0
    assert "folders and digests agree" not in done.output


def test_from_the_folder_of_a_registered_model(place, tmp_path):
    """A copy of a model folder anywhere is known by its digest."""
    shutil.copytree(place.folder("stage_two"), tmp_path / "copy")
    assert complete(place, place.trace(tmp_path / "copy"))


def test_from_an_image(place, tmp_path):
    """An image that was drawn by a registered model leads to it, wherever the file went."""
    model = find_model(place.uri, str(place.store.root))
    pixels = draw(model.folder, ["ein größerer Käfer"], seed=3)
    (path,) = write_images(pixels, ["ein größerer Käfer"], tmp_path, model=model, seed=3)
    found = place.trace(path.rename(tmp_path / "elsewhere.png"))
    assert complete(place, found)
    assert found.image["caption"] == "ein größerer Käfer"
    assert found.image["seed"] == "3"
    assert "noise_scale" not in found.image
    assert found.image["sha256"] == found.model["sha256"]


def test_an_image_says_with_which_noise_scale_it_was_drawn(place, tmp_path):
    """Where it was asked for one."""
    model = find_model(place.uri, str(place.store.root))
    pixels = draw(model.folder, ["a"])
    (path,) = write_images(pixels, ["a"], tmp_path, model=model, seed=0, noise_scale=0.5)
    assert place.trace(path).image["noise_scale"] == "0.5"
    done = CliRunner().invoke(app, ["lineage", str(path), "--store", str(place.store.root)])
    assert "Drawn: 'a', seed 0, noise scale 0.5" in done.output


def test_from_an_image_that_a_model_folder_drew(place, tmp_path):
    """An image drawn by a folder leads to the version that was registered from its like."""
    shutil.copytree(place.folder("stage_two"), tmp_path / "copy")
    model = find_model(str(tmp_path / "copy"), None)
    (path,) = write_images(draw(model.folder, ["a"]), ["a"], tmp_path, model=model, seed=0)
    assert complete(place, place.trace(path))


def test_an_image_of_another_registry(place, tmp_path):
    """Where the version of that name is another model, it is said and not taken for the image's."""
    other = write_small_model(tmp_path / "other")
    (other / "more").write_text("")
    model = find_model(str(other), None)
    model = type(model)(**(vars(model) | {"name": NAME, "version": "1", "uri": place.uri}))
    (path,) = write_images(draw(other, ["a"]), ["a"], tmp_path, model=model, seed=0)
    found = place.trace(path)
    assert any("another registry" in text for text in found.problems)
    assert any("no registered version has its digest" in text for text in found.unreached)
    assert found.stages == []


def test_from_the_folder_of_a_stage_that_nobody_registered(tmp_path, place):
    """The mark of a model that is not registered leads to its stages and data, too."""
    (place.store.root / "mlflow.db").unlink()
    found = place.trace(place.folder("stage_two"))
    assert found.problems == []
    assert {one["name"]: one["key"] for one in found.stages} == KEYS
    assert found.data["manifest"] == place.manifest
    assert found.data["shard_count"] > 0
    (unreached,) = found.unreached
    assert unreached.startswith("registry: none in ")
    assert not (place.store.root / "mlflow.db").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_gone(place, stage):
    """A stage that the store has no longer is named as out of reach, not as wrong."""
    shutil.rmtree(place.folder(stage))
    found = place.trace(place.uri)
    assert found.problems == []
    assert any(folder_of(stage) in text for text in found.unreached)
    assert len(found.stages) == len(STAGES)


def _change_stage(place):
    (place.folder("stage_two") / STUDENT).write_bytes(b"other")
    return "the folder was changed since"


def _change_registered(place):
    path = place.tracker.settings.local / "logged" / "artifacts" / place.folder("stage_two").name
    (path / STUDENT).write_bytes(b"other")
    return f"{place.uri} is damaged"


def _change_key(place):
    mark = place.store.done(folder_of("teacher"))
    place.store.publish(folder_of("teacher"), mark | {"key": "f" * 64})
    return f"has the key {'f' * 64}"


def _change_manifest(place):
    mark = place.store.done(folder_of("prepare"))
    place.store.publish(folder_of("prepare"), mark | {"result": {"manifest": "e", "place": None}})
    return "made the data version e"


def _cut_shard(place):
    path = next(place.folder("prepare").glob("train-*.tar"))
    path.write_bytes(path.read_bytes()[:-512])
    return f"{path.name} .* bytes, expected"


def _remove_shard(place):
    path = next(place.folder("prepare").glob("test-*.tar"))
    path.unlink()
    return f"lacks the shard {path.name}"


@pytest.mark.parametrize(
    "change",
    [_change_stage, _change_registered, _change_key, _change_manifest, _cut_shard, _remove_shard],
)
def test_what_does_not_agree_is_named(place, change):
    """A changed folder, key, manifest or shard is a problem, and the command exits with 1."""
    text = change(place)
    found = place.trace(place.uri)
    (problem,) = found.problems
    assert re.search(text, problem)
    done = CliRunner().invoke(app, ["lineage", place.uri, "--store", str(place.store.root)])
    assert done.exit_code == 1
    assert "does not agree" in done.output


def test_the_command_prints_it(place):
    """`sdn lineage` shows keys, folders and shards; `--json` gives all of it in the last line."""
    store = str(place.store.root)
    done = CliRunner().invoke(app, ["lineage", NAME, "--store", store], env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    for text in (place.manifest, *KEYS.values(), "train-00000.tar", "folders and digests agree"):
        assert text in done.output
    narrow = CliRunner().invoke(app, ["lineage", NAME, "--store", store], env={"COLUMNS": "80"})
    for name in KEYS:
        assert f'config of {name}: {{"of": "{name}"}}' in narrow.output.splitlines()
    done = CliRunner().invoke(app, ["lineage", NAME, "--store", store, "--json"])
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(
        json.dumps(place.trace(NAME).as_dict())
    )


def test_a_foreign_image(place, tmp_path):
    """An image without our metadata, and a file that is none, say what was expected."""
    Image.new("RGB", (4, 4)).save(tmp_path / "some.png")
    with pytest.raises(ValueError, match="does not say which model drew it"):
        drawn_by(tmp_path / "some.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="is no readable image"):
        place.trace(tmp_path / "text.png")


@pytest.mark.parametrize("target", ["sdn-unknown", "models:/sdn-unknown/1", f"models:/{NAME}/7"])
def test_no_such_model(place, target):
    """What is neither registered nor a file is an error that names it."""
    with pytest.raises(RegistryError, match=f"no model {target}"):
        place.trace(target)


def test_nothing_registered_makes_no_registry(tmp_path):
    """Asking in an empty store says so and leaves it empty."""
    with pytest.raises(RegistryError, match="nothing is registered"):
        trace(NAME, str(tmp_path))
    assert list(tmp_path.iterdir()) == []

"""A model on its way into MLflow's registry: what comes in, what is turned away."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import registered_model
from mlflow.exceptions import MlflowException
from PIL import Image
from places import COMMAND, background, free_port
from registered_model import CAPTIONS, CONFIG, NAME, SEEDS

from pipelines.digests import folder_digest
from pipelines.generation import find_model
from pipelines.model_check import FORBIDDEN, SAMPLES
from pipelines.ports import listens
from pipelines.registry import CHALLENGER, DamagedModelError, RegistryError, model_folder
from pipelines.release import SENTENCE_PACKAGES
from pipelines.settings import Settings
from sdn.sampling import STUDENT
from sdn.tensor_files import read_tensors, write_tensors

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def place(tmp_path):
    """A model and its samples, nothing registered."""
    return registered_model.place(tmp_path)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The same with MLflow on a server that asks for a login, as `sdn up` and containers run it."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("SDN_AUTH", "someone:not-a-real-password")
    for name, value in Settings().logins.items():  # a client of MLflow sets them: end with the test
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SDN_CACHE", str(tmp_path / "cache"))
    words = ("--port", str(port), "--artifacts", str(tmp_path / "artifacts"))
    words += ("--database", f"sqlite:///{tmp_path}/served.db")
    log = tmp_path / "mlflow.log"
    with background(COMMAND, "serve", "mlflow", *words, env=dict(os.environ), log=log):
        until = time.monotonic() + 90
        while not listens(port):
            assert time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.2)
        yield registered_model.place(tmp_path, uri)


def versions(place):
    """All versions of the model in the registry."""
    try:
        return place.tracker.client.search_model_versions(f"name = '{NAME}'")
    except MlflowException:
        return []


def test_a_model_that_draws_its_samples_is_registered(place):
    """It becomes a challenger with digest, code and the caller's tags, is the same model when it
    is fetched, and comes once for each key."""
    found = place.register(tags={"sdn.manifest": "abc"})
    assert found == {"name": NAME, "version": "1", "uri": f"models:/{NAME}/1"}
    assert place.register() == found
    (version,) = versions(place)
    assert version.tags["sdn.sha256"] == folder_digest(place.model)
    assert version.tags["sdn.manifest"] == "abc"
    assert version.tags["sdn.code"].startswith("0.")
    holder = place.tracker.client.get_model_version_by_alias(NAME, CHALLENGER)
    assert str(holder.version) == "1"
    model = find_model(f"models:/{NAME}@{CHALLENGER}", str(place.store))
    assert (model.name, model.version, model.uri) == (NAME, "1", f"models:/{NAME}/1")
    assert model.sha256 == folder_digest(place.model)
    assert {path.name for path in model.folder.iterdir()} == {
        path.name for path in place.model.iterdir()
    }
    assert place.register(key="another")["version"] == "2"


def test_a_model_is_registered_on_a_server(served, tmp_path):
    """Its files go through the server into its folder, and come back the same."""
    found = served.register()
    assert found == {"name": NAME, "version": "1", "uri": f"models:/{NAME}/1"}
    (version,) = versions(served)
    assert version.tags["sdn.sha256"] == folder_digest(served.model)
    assert list((tmp_path / "artifacts").rglob(STUDENT))
    folder, _, _ = model_folder(served.tracker.settings, f"models:/{NAME}@{CHALLENGER}")
    assert folder_digest(folder) == folder_digest(served.model)


def _other_pixels(place):
    path = place.samples / "01.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[3, 4] = 255 - pixels[3, 4]
    Image.fromarray(pixels).save(path)


def _other_bytes(place):
    Image.open(place.samples / "01.png").save(place.samples / "01.png", compress_level=1)


def _other_caption(place):
    listed = json.loads((place.samples / SAMPLES).read_text())
    listed["samples"][1]["caption"] = "keycap 7"
    (place.samples / SAMPLES).write_text(json.dumps(listed))


def _other_weights(place):
    tensors, settings = read_tensors(place.model / STUDENT)
    tensors["convs.image.bias"] += 0.1
    write_tensors(place.model / STUDENT, tensors, settings)


def test_a_model_brings_what_its_encoder_needs(tmp_path):
    """The sentence encoder's packages need scikit-learn, which no other model may; without being
    named they do not bring it."""
    pytest.importorskip("sentence_transformers", reason="the extra `sentence` is not installed")
    encoder = dataclasses.replace(CONFIG.captions, encoder="sentence", max_chars=80)
    config = dataclasses.replace(CONFIG, captions=encoder)
    place = registered_model.place(tmp_path, config=config, packages=SENTENCE_PACKAGES)
    with pytest.raises(RegistryError, match="sklearn"):
        dataclasses.replace(place, packages=()).register()
    assert place.register()["version"] == "1"


def _cut_weights(place):
    data = (place.model / STUDENT).read_bytes()
    (place.model / STUDENT).write_bytes(data[:-100])


def _no_samples(place):
    (place.samples / SAMPLES).write_text('{"samples": []}')


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_other_pixels, r"01\.png .*drawn alone\): 1 pixels differ"),
        (_other_bytes, r"01\.png .*equal pixels, other bytes"),
        (_other_caption, r"01\.png \('keycap 7'.*pixels differ"),
        (_other_weights, r"00\.png .*pixels differ"),
        (_cut_weights, "student.safetensors is not a whole model file"),
        (_no_samples, "lists no samples"),
    ],
)
def test_a_model_that_draws_otherwise_is_not_registered(place, change, text):
    """Wrong samples and tampered weights are named; the registry stays as it was."""
    change(place)
    with pytest.raises(RegistryError, match=text) as caught:
        place.register()
    assert "othing is registered" in str(caught.value)
    assert versions(place) == []


def test_weights_changed_in_the_registry_are_refused(place):
    """A registered model whose file was changed afterwards is not handed out."""
    place.register()
    folder, _, _ = model_folder(place.tracker.settings, f"models:/{NAME}/1")
    data = bytearray((folder / STUDENT).read_bytes())
    data[-5] ^= 1
    (folder / STUDENT).write_bytes(data)
    with pytest.raises(DamagedModelError, match=f"models:/{NAME}/1 is damaged"):
        find_model(f"models:/{NAME}/1", str(place.store))


def test_it_loads_without_what_only_training_needs(place, tmp_path):
    """With Ray, Prefect and the training's packages absent, and the project on no path, the model
    loads by its URI and draws the samples."""
    found = place.register()
    code = f"""
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {(*FORBIDDEN, "pipelines", "torchmetrics", "scipy")!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import mlflow
mlflow.set_tracking_uri({f"sqlite:///{place.store}/mlflow.db"!r})
model = mlflow.pyfunc.load_model({found["uri"]!r})
import pathlib
for caption, seed, file in {[(c, s, f"{n:02d}.png") for n, (c, s) in enumerate(zip(CAPTIONS, SEEDS, strict=True))]!r}:
    (png,) = model.predict([caption], params={{"seed": seed}})
    assert png == (pathlib.Path({str(place.samples)!r}) / file).read_bytes(), file
print(sys.modules["sdn"].__file__)
"""  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mlflow-artifacts" in done.stdout.splitlines()[-1]

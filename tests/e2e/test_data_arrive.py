"""Data arrive, the champion is trained on, and it is replaced only by a better one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from itertools import product
from typing import TYPE_CHECKING, Any

import httpx
import mlflow
import pytest
from PIL import Image, ImageDraw
from places import COMMAND, place

from pipelines.flows.arrival import arrival_event
from sdn.data.dataset import open_dataset
from sdn.data.files import LocalFolder
from sdn.data.manifest import read_versions

if TYPE_CHECKING:
    from pathlib import Path

NAME = "sdn-tiny"
FIRST = ("data.test_share=0.3", "data.validation_share=0.05", "data.limit=null", "search.trials=0",
         "teacher.epochs=1", "captions.epochs=2", "stage_one.epochs=0", "stage_two.epochs=1",
         "stage_two.rate=0.001", "evaluation.judge.epochs=2", "promotion.level=0.2",
         "workers=1")  # fmt: skip
"""A short chain whose first model beats untrained weights, and is far behind one trained on."""
COLOURS = ("red", "green", "blue", "yellow", "black", "purple", "orange", "brown")
SHAPES = ("circle", "square", "bar", "cross")
SIZES = {"small": 5, "large": 11}


def draw(folder: Path, numbers: range) -> None:
    """A shape with its caption for each number."""
    folder.mkdir(exist_ok=True)
    kinds = list(product(SIZES, COLOURS, SHAPES))
    for number in numbers:
        size, colour, shape = kinds[number % len(kinds)]
        image = Image.new("RGB", (32, 32), "white")
        pen, r = ImageDraw.Draw(image), SIZES[size]
        x, y = 16 + number // len(kinds) % 3 - 1, 16 + number // len(kinds) // 3 % 3 - 1
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
        if shape in {"bar", "cross"}:
            pen.rectangle((x - r, y - 2, x + r, y + 2), fill=colour)
        if shape == "cross":
            pen.rectangle((x - 2, y - r, x + 2, y + r), fill=colour)
        image.putpixel((0, 0), (255, 255, number % 256))  # no two are equal
        # The caption first: an image is complete as soon as it is there.
        (folder / f"shape{number:04d}.txt").write_text(f"a {size} {colour} {shape}\n")
        image.save(folder / f"shape{number:04d}.png")


class Here:
    """A landing place, the data set that grows from it, and a registry."""

    def __init__(self, folder: Path) -> None:
        self.place = place(folder)
        self.landing, self.dataset = folder / "landing", folder / "set"
        self.answers: list[dict[str, Any]] = []

    def command(self, *more: str) -> list[str]:
        changes = [part for change in FIRST for part in ("--set", change)]
        return [
            "retrain", str(self.landing), "--into", str(self.dataset), "--recipe", "tiny",
            "--source", "folder", "--store", str(self.place.store), "--min-new", "60",
            "--settle-s", "1", "--quiet-s", "1", *changes, "--json", *more,
        ]  # fmt: skip

    def retrain(self, *more: str) -> dict[str, Any]:
        done = self.place.sdn(*self.command(*more))
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def client(self) -> mlflow.MlflowClient:
        uri = f"sqlite:///{self.place.store / 'mlflow.db'}"
        return mlflow.MlflowClient(uri, uri)

    def champion(self) -> str:
        return str(self.client().get_model_version_by_alias(NAME, "champion").version)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Here:
    """Version 1 is champion, trained on a part of the data."""
    found = Here(tmp_path_factory.mktemp("growing"))
    draw(found.landing, range(130))
    found.answers.append(found.retrain())
    return found


def at_once(here: Here, *more: str) -> list[dict[str, Any]]:
    """Two triggers in the same moment; what both answer."""
    command = (COMMAND, *here.command(*more))
    both = [
        subprocess.Popen(command, env=here.place.env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [one.communicate(timeout=300)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    return [json.loads(text.splitlines()[-1]) for text in said]


@pytest.mark.rest
def test_a_champion_is_trained_on_as_data_arrive(here):
    """First model, nothing new, the rest arrives and two runs at once: one trains v2 from v1."""
    (first,) = here.answers
    assert (first["outcome"], first["ingest"]["version"]) == ("FirstModel", 1)
    assert here.champion() == "1"

    nothing = here.retrain()
    assert nothing["outcome"] == "NothingNew"
    assert f"nothing new at {here.landing}" in nothing["message"]
    assert "stages" not in nothing

    draw(here.landing, range(130, 290))
    half = (here.landing / "shape0000.png").read_bytes()
    (here.landing / "half.txt").write_text("a half written picture\n")
    (here.landing / "half.png").write_bytes(half[: len(half) // 2])
    (here.landing / "early.png").write_bytes(half)
    before = {path.name: path.read_bytes() for path in here.landing.iterdir()}
    found = at_once(here, "--epochs", "12", "--rate", "0.001")
    second, other = sorted(found, key=lambda one: one["outcome"] == "UnderWay")
    assert other["outcome"] == "UnderWay"
    assert second["outcome"] == "Promoted", second["message"]
    assert second["parent"] == "1"
    assert here.champion() == second["model"]["version"] == "2"

    # From v1's own weights, teacher and captions, on what is there now.
    stages = {name: one["key"] for name, one in first["stages"].items()}
    folder = here.place.store / second["stages"]["stage_two"]["folder"]
    inputs = json.loads((folder / "done.json").read_text())["inputs"]
    assert inputs == {
        "data": second["ingest"]["manifest"],
        "start": stages["stage_two"],
        "teacher": stages["teacher"],
        "captions": stages["captions"],
    }
    tags = here.client().get_model_version(NAME, "2").tags
    assert tags["sdn.parent"] == "1"
    assert tags["sdn.key.start"] == stages["stage_two"]
    # The same test images as v1's evaluation; those that came are looked at by themselves.
    for name in ("reference", "judge"):
        assert second["stages"][name]["key"] == stages[name]
    scored = here.place.store / second["stages"]["evaluate"]["folder"] / "done.json"
    assert json.loads(scored.read_text())["inputs"]["data"] == first["ingest"]["manifest"]
    assert "evaluate_new" in second["stages"]
    assert "new test images" in second["message"]

    # Nothing half written was taken, and nothing became a dead letter, or went away.
    waiting = {one["name"]: one["reason"] for one in second["ingest"]["first_waiting"]}
    assert set(waiting) == {"half.png", "half.txt", "early.png"}
    data = open_dataset(here.dataset)
    assert data.manifest.dead_letters == 0
    assert sum(data.manifest.counts.values()) == 290
    after = {path.name: path.read_bytes() for path in here.landing.iterdir()}
    assert after == before

    traced = here.place.sdn("lineage", NAME, "--store", str(here.place.store), "--json")
    lineage = json.loads(traced.stdout.splitlines()[-1])
    assert (lineage["problems"], lineage["unreached"]) == ([], [])
    assert "start" in [one["name"] for one in lineage["stages"]]


@pytest.mark.rest
def test_a_model_that_is_no_better_is_not_promoted(here):
    """What waited is taken once it is whole; a retraining that changes nothing is rejected."""
    shutil.copy(here.landing / "shape0001.png", here.landing / "half.png")
    draw(here.landing, range(290, 300))
    champion = here.champion()
    third = here.retrain("--min-new", "1", "--epochs", "0.2", "--rate", "1e-7")
    assert third["outcome"] == "Rejected", third["message"]
    assert here.champion() == champion
    versions = read_versions(LocalFolder(here.dataset))
    assert sum(versions[0].counts.values()) == 301
    assert [one["name"] for one in third["ingest"]["first_waiting"]] == ["early.png"]
    settled = here.retrain("--min-new", "1")
    assert settled["outcome"] == "NothingNew"
    scored = here.place.sdn("evaluate", "--store", str(here.place.store), "--json")
    assert scored.returncode == 0, scored.stderr[-2000:]


def test_the_event_starts_one_run_however_often_it_is_sent(server, tmp_path):
    """The same event twice, and one of another sender: one run of the worker takes what came.

    Another event later: a second one, which says that nothing has come since.
    """
    landing, dataset = tmp_path / "landing", tmp_path / "set"
    draw(landing, range(40))
    for path in landing.iterdir():
        os.utime(path, (0, 0))  # nobody writes them any more
    deployment = server.deployments["sdn-retrain"]["id"]

    def send(*events: dict[str, Any]) -> None:
        for one in events:
            httpx.post(f"{server.api}/events", json=[one], timeout=30).raise_for_status()

    def runs() -> list[dict[str, Any]]:
        wanted = {"deployments": {"id": {"any_": [deployment]}}}
        found = server.post("flow_runs/filter", wanted)
        mine = [one for one in found if one["parameters"].get("landing") == str(landing)]
        return sorted(mine, key=lambda one: str(one["created"]))

    def ended(count: int) -> bool:
        states = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        return sum(one["state"]["type"] in states for one in runs()) == count

    event = arrival_event(str(landing), str(dataset), "the same state")
    send(event, event, arrival_event(str(landing), str(dataset)))
    server.wait_until(lambda: ended(1), 180, "the end of the run that the event started")
    (only,) = runs()
    assert (only["state"]["type"], only["state"]["name"]) == ("COMPLETED", "Waiting")
    assert "of 100 new training samples" in only["state"]["message"]
    assert only["parameters"]["dataset"] == str(dataset)
    artifacts = server.post("artifacts/filter", {})
    mine = {a["key"] for a in artifacts if a["flow_run_id"] == only["id"]}
    assert {"resolved-config", "arrived", "outcome"} <= mine
    (version,) = read_versions(LocalFolder(dataset))
    assert sum(version.counts.values()) == 40

    send(arrival_event(str(landing), str(dataset), "another state"))
    server.wait_until(lambda: ended(2), 120, "the end of the run of the other event")
    _, second = runs()
    assert (second["state"]["type"], second["state"]["name"]) == ("COMPLETED", "NothingNew")
    assert f"nothing new at {landing}" in second["state"]["message"]
    assert len(read_versions(LocalFolder(dataset))) == 1

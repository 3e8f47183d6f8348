"""The tiny recipe through Prefect, Ray and MLflow: what it does, leaves, and does not do twice."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from places import COMMAND

from pipelines.points import read_points, spooled_points
from sdn.checkpoint import Checkpoints
from sdn.data.dataset import open_dataset
from sdn.data.files import LocalFolder
from sdn.ledger import attempts_of
from sdn.recipes import recipe
from sdn.taps import blocks_of, taps_of

STAGES = [
    "prepare", "teacher", "reference", "judge", "captions", "stage_one", "search", "stage_two",
    "evaluate", "compare",
]  # fmt: skip
CAPTION = "Santa Claus: dark skin tone"


def folder_of(chain, name: str) -> Path:
    """Local folder of a finished stage."""
    here, answer = chain
    return here.store / answer["stages"][name]["folder"]


def test_every_stage_ran_in_order(chain):
    """All stages of the chain ran, each under its own key, and the answer is the last line."""
    _, answer = chain
    assert list(answer["stages"]) == STAGES
    assert all(stage["fresh"] for stage in answer["stages"].values())
    assert len({stage["key"] for stage in answer["stages"].values()}) == len(STAGES)
    assert Path(answer["report"]).is_file()
    assert Image.open(answer["contact_sheet"]).width > 300


@pytest.mark.parametrize("name", ["stage_one", "stage_two"])
def test_both_stages_ran_on_two_ray_workers_that_read_every_sample(chain, name):
    """Two processes took part, and together consumed each training sample once an epoch."""
    _, answer = chain
    result = answer["stages"][name]["result"]
    ranks = {worker["rank"]: worker["pid"] for worker in result["workers"]}
    assert sorted(ranks) == [0, 1]
    assert len(set(ranks.values()) | {os.getpid()}) == 3
    samples = open_dataset(folder_of(chain, "prepare")).samples("train")
    epochs = {"stage_one": 3, "stage_two": 12}[name]
    assert result["images_seen"] == epochs * samples
    assert result["ledger"] == {
        "checked": True,
        "samples": epochs * samples,
        "epochs": epochs,
        "lost": 0,
        "twice": 0,
        "attempts": 1,
        "rolled_back": 0,
    }


@pytest.mark.parametrize("name", ["teacher", "captions"])
def test_the_fits_consumed_whole_batches_once_an_epoch(chain, name):
    """The ledger of a fit adds up, too: all samples but those that do not fill a batch."""
    _, answer = chain
    config = getattr(recipe("tiny"), name)
    samples = open_dataset(folder_of(chain, "prepare")).samples("train")
    per_epoch = samples - samples % min(config.batch, samples)
    found = answer["stages"][name]["result"]["ledger"]
    assert (found["checked"], found["lost"], found["twice"]) == (True, 0, 0)
    assert (found["epochs"], found["samples"]) == (config.epochs, config.epochs * per_epoch)


def test_short_trials_alone_do_not_replace_the_recipes_own_weights(chain):
    """The search's trials differ, have scores, and without a re-run the recipe's weights stay."""
    _, answer = chain
    search = answer["stages"]["search"]["result"]
    own, other = search["trials"]
    assert own["values"] == search["own"] != other["values"]
    assert own["state"] == "finished"
    assert all(trial["value"] > 0 for trial in (own, other))
    assert search["chosen"] == 0
    assert "search.reruns=0" in search["reason"]
    used = answer["stages"]["stage_two"]["result"]["weights"]
    assert {k: used[k] for k in own["values"]} == own["values"]
    pictures = folder_of(chain, "search") / "pictures"
    assert Image.open(pictures / "history.png").width > 300
    assert "Plotly" in (pictures / "parallel-coordinates.html").read_text()


@pytest.mark.rest
def test_a_rerun_is_the_stage_that_follows_and_its_weights_can_be_reused(chain, tmp_path):
    """Re-run at full length, the taken trial is not trained again; another run takes its weights.

    A level of nearly a half takes whatever is better at all; without ASHA no trial is stopped,
    and only those that came to their end are re-run.
    """
    here, answer = chain
    store = tmp_path / "store"  # what it registers is not the others' business
    shutil.copytree(here.store, store, ignore=shutil.ignore_patterns("ml*"))
    here = dataclasses.replace(here, store=store)
    changes = ["search.reruns=1", "search.rerun_level=1", "search.level=0.49"]
    changes += ["search.scheduler=none"]
    options = [part for change in changes for part in ("--set", change)]
    again = here.run(*options)
    search = again["stages"]["search"]["result"]
    assert [trial.get("full") is not None for trial in search["trials"]] == [True, True]
    full = [trial["full"]["value"] for trial in search["trials"]]
    taken = search["chosen"]
    assert (taken == 1) <= (full[1] < full[0])
    assert search["trials"][taken]["full"]["stages"] == [again["stages"]["stage_two"]["folder"]]
    assert not again["stages"]["stage_two"]["fresh"]
    used = again["stages"]["stage_two"]["result"]["weights"]
    values = search["trials"][taken]["values"]
    assert {k: used[k] for k in values} == pytest.approx(values)
    assert search["rank_correlation"]["trials"] == 2
    name = Path(again["stages"]["search"]["folder"]).name
    reused = here.run("--weights-from", name)
    assert reused["stages"]["search"]["result"]["trials"] == []
    assert reused["stages"]["stage_two"]["key"] == again["stages"]["stage_two"]["key"]
    assert answer["stages"]["stage_one"]["key"] == reused["stages"]["stage_one"]["key"]
    assert reused["weights_from"] == name
    report = html.unescape(Path(reused["report"]).read_text())
    assert all(json.dumps(value) in report for value in values.values())


def test_every_term_is_logged_under_its_own_name(chain):
    """Each stage's points hold all taps of the teacher and the total."""
    expected = {f"loss/{tap.name}" for tap in taps_of(blocks_of("vgg11", 0.125))} | {"loss/total"}
    for name in ("stage_one", "stage_two"):
        points = list(read_points(folder_of(chain, name)))
        assert points
        assert all(set(point["losses"]) == expected for point in points)


def test_a_second_run_does_nothing(chain):
    """The same command again finds everything done, and says so."""
    here, answer = chain
    told = here.sdn("run", "tiny", "--store", str(here.store))
    assert "nothing to do" in told.stdout
    assert f"model: sdn-tiny version {answer['model']['version']} " in told.stdout
    assert "search: the recipe's own values stay: search.reruns=0" in told.stdout
    name = Path(answer["stages"]["search"]["folder"]).name
    assert f"its weights again: sdn run tiny --weights-from {name} --store" in told.stdout


def test_mlflow_has_the_runs_and_the_model(chain):
    """One parent run; a nested run a stage and a trial; pictures, config, tags; a champion."""
    here, answer = chain
    script = """
import json, sys, mlflow
client = mlflow.MlflowClient(sys.argv[1], sys.argv[1])
experiment = client.get_experiment_by_name("sdn-tiny")
runs = client.search_runs([experiment.experiment_id])
version = client.get_model_version_by_alias("sdn-tiny", "champion")
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/sdn-tiny@champion")
png = model.predict(["Santa Claus: dark skin tone"], params={"seed": 1})[0]
open(sys.argv[2], "wb").write(png)
samples = json.load(open(sys.argv[3] + "/samples.json"))["samples"]
same = [model.predict([s["caption"]], params={"seed": s["seed"]})[0]
        == open(f"{sys.argv[3]}/{s['file']}", "rb").read() for s in samples]
history = {r.data.tags["sdn.name"]: len(client.get_metric_history(r.info.run_id, "loss/total"))
           for r in runs if r.data.tags["sdn.name"].startswith("stage")}
print(json.dumps({
    "runs": [[r.info.run_id, r.data.tags.get("sdn.name"), r.data.tags.get("mlflow.parentRunId"),
              r.info.status] for r in runs],
    "params": {r.data.tags["sdn.name"]: len(r.data.params) for r in runs},
    "artifacts": [f.path for r in runs if r.data.tags["sdn.name"] == "tiny"
                  for f in client.list_artifacts(r.info.run_id)],
    "search": [f.path for r in runs if r.data.tags["sdn.name"] == "search"
               for f in client.list_artifacts(r.info.run_id)],
    "version": version.version, "tags": version.tags, "card": version.description,
    "same": same, "history": history, "signature": model.metadata.signature.to_dict()}))
"""
    png = here.store.parent / "served.png"
    samples = folder_of(chain, "evaluate") / "samples"
    done = subprocess.run(
        [sys.executable, "-c", script, answer["tracking_uri"], str(png), str(samples)],
        env=here.env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (parent,) = [run for run in found["runs"] if run[1] == "tiny"]
    nested = {run[1]: run for run in found["runs"] if run[1] != "tiny"}
    assert {*STAGES, "trial 0", "trial 1"} == set(nested)
    assert {nested[name][2] for name in STAGES} == {parent[0]}
    assert nested["trial 0"][2] == nested["search"][0]
    # A trial that was behind at a rung was stopped.
    assert {run[3] for run in found["runs"] if run[1] != "trial 1"} == {"FINISHED"}
    assert nested["trial 1"][3] in {"FINISHED", "KILLED"}
    assert {"weights.json", "trials.json", "pictures"} <= set(found["search"])
    assert found["params"]["tiny"] > 50
    assert {"config.json", "contact-sheet.png", "report.html"} <= set(found["artifacts"])
    assert found["history"]["stage_one"] == len(list(read_points(folder_of(chain, "stage_one"))))
    assert str(found["version"]) == answer["model"]["version"] == "1"
    for name in STAGES:
        assert found["tags"][f"sdn.key.{name}"] == answer["stages"][name]["key"]
    assert found["same"] == [True] * recipe("tiny").evaluation.samples
    decision = json.loads(found["tags"]["sdn.decision"])
    assert decision["promoted"]
    assert decision["kid"]["p_value"] < 0.025
    assert float(found["tags"]["sdn.score.kid_error"]) > 0
    assert "CC BY-SA 4.0" in found["card"]
    assert re.search(r"images: \d+ train, \d+ validation, \d+ test; manifest", found["card"])
    assert "binary" in found["signature"]["outputs"]
    assert "seed" in found["signature"]["params"]
    # What the registry's model draws is what `sdn generate` writes.
    out = here.store.parent / "generated.png"
    drawn = here.sdn("generate", CAPTION, "--store", str(here.store), "--out", str(out))
    assert drawn.returncode == 0, drawn.stderr
    first, second = Image.open(io.BytesIO(png.read_bytes())), Image.open(out)
    assert first.size == (32, 32)
    assert first.tobytes() == second.tobytes()
    assert second.info["sdn:caption"] == CAPTION


def test_prefect_has_config_progress_and_contact_sheet(chain):
    """The flow's artifacts: resolved config first, progress of stages, scores with the sheet."""
    here, _ = chain
    script = """
import asyncio, json
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import ArtifactSort
async def read():
    async with get_client() as client:
        found = await client.read_artifacts(limit=100)
        return sorted(([a.created.isoformat(), a.key, str(a.data)] for a in found))
print(json.dumps(asyncio.run(read())))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=here.env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found[0][1] == "resolved-config"
    assert '"global_batch": 16' in found[0][2]
    keys = {key for _, key, _ in found}
    wanted = {"progress-stage-one", "progress-stage-two", "result", "decision", "report"}
    assert wanted <= keys
    result = next(data for _, key, data in found if key == "result")
    assert "data:image/png;base64," in result
    assert "| stage two |" in result


def test_the_registered_model_is_scored_again(chain):
    """`sdn evaluate` finds data and teacher of a model by itself and comes to the run's scores."""
    here, first = chain
    model = f"models:/{first['model']['name']}/{first['model']['version']}"
    done = here.sdn("evaluate", "--model", model, "--store", str(here.store), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["captions"] == first["captions"]
    again, before = found["scores"][found["model"]], first["scores"]["stage two"]
    assert again.keys() == before.keys()
    told = {name: score["value"] for name, score in before.items() if "value" in score}
    assert {name: again[name].get("value") for name in told} == pytest.approx(told, rel=1e-3)
    assert len(told) > 10
    assert Path(found["report"]).is_file()


@pytest.mark.rest
def test_a_killed_run_goes_on_where_it_was(chain):
    """SIGKILL in the middle of stage two: no process stays, and the same command resumes it."""
    here, _ = chain
    changes = ["--set", "search.trials=0", "--set", "stage_two.epochs=24"]
    place = killed_run(here, changes, "stage_two", step=60)
    saved = Checkpoints(place).newest()
    assert saved is not None
    answer = here.run(*changes)
    # The killed run had already ended its search, which had nothing to compare.
    fresh = {name for name, stage in answer["stages"].items() if stage["fresh"]}
    assert fresh == {"stage_two", "evaluate", "compare"}
    result = answer["stages"]["stage_two"]["result"]
    attempts = attempts_of(place)
    assert len(attempts) == 2
    assert attempts[1].start == saved.step > 25, "training did not resume from its checkpoint"
    assert result["ledger"]["attempts"] == 2
    assert (result["ledger"]["lost"], result["ledger"]["twice"]) == (0, 0)
    steps = [point["step"] for point in read_points(folder_of((here, answer), "stage_two"))]
    assert steps == sorted({*range(20, result["steps"], 20), result["steps"]})


@pytest.mark.rest
def test_a_loss_that_is_not_finite_is_not_run_into_again(chain):
    """A rate that blows the weights up ends stage one at once, the second time before it starts."""
    here, _ = chain
    changes = ["--set", "stage_one.rate=0.99", "--set", "stage_one.schedule=constant"]
    changes += ["--set", "stage_one.precision=float32", "--set", "stage_one.scale=raw"]
    changes += ["--set", "stage_one.weights.image=1e30", "--set", "stage_one.weights.conv5=1e30"]
    first = here.sdn("run", "tiny", "--store", str(here.store), *changes)
    assert first.returncode == 1
    for words in ("stage_one: loss not finite at step", "--set stage_one.rate=", "clip=1"):
        assert words in first.stderr
    assert "Traceback" not in first.stderr
    (failed,) = (here.store / "training").glob("stage_one-*/failed.json")
    before = len(attempts_of(LocalFolder(failed.parent)))
    second = here.sdn("run", "tiny", "--store", str(here.store), *changes)
    assert second.returncode == 1
    assert "was found by an earlier run" in second.stderr
    assert len(attempts_of(LocalFolder(failed.parent))) == before


@pytest.mark.rest
def test_a_killed_stage_three_goes_on_and_its_model_draws(chain):
    """Critics and noise on two Ray workers: resumed, scored, registered, drawn, traced."""
    here, _ = chain
    changes = {
        "search.trials": 0, "student.noise": 8, "student.condition": "levels",
        "stage_one.epochs": 1, "stage_two.epochs": 1, "stage_three.epochs": 10,
        "stage_three.diversity": 0.05,
        "stage_three.augment": "differentiable", "stage_three.checkpoint_images": 400,
    }  # fmt: skip
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    place = killed_run(here, options, "stage_three", step=60)
    answer = here.run(*options)
    fresh = {name for name, stage in answer["stages"].items() if stage["fresh"]}
    assert fresh == {"stage_three", "evaluate", "compare"}
    attempts = attempts_of(place)
    assert len(attempts) == 2
    assert attempts[1].start > 0, "training began again instead of resuming from its checkpoint"
    ledger = answer["stages"]["stage_three"]["result"]["ledger"]
    assert (ledger["attempts"], ledger["lost"], ledger["twice"]) == (2, 0, 0)
    *_, last = read_points(folder_of((here, answer), "stage_three"))
    assert {"loss/critics", "loss/adversary", "loss/diversity"} <= last["losses"].keys()
    assert answer["scores"]["stage three"]["caption_diversity_score"]["value"] > 0
    model = f"models:/{answer['model']['name']}/{answer['model']['version']}"
    images = []
    for seed in ("1", "1", "2"):
        path = here.store.parent / f"drawn-{len(images)}.png"
        done = here.sdn(
            "generate", CAPTION, "--model", model, "--store", str(here.store), "--seed", seed,
            "--out", str(path),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        images.append(Image.open(path).tobytes())
    assert images[0] == images[1] != images[2]
    traced = here.sdn("lineage", model, "--store", str(here.store), "--json")
    lineage = json.loads(traced.stdout.splitlines()[-1])
    assert (lineage["problems"], lineage["unreached"]) == ([], [])
    assert "stage_three" in [stage["name"] for stage in lineage["stages"]]


def killed_run(here, changes: list[str], stage: str, step: int) -> LocalFolder:
    """SIGKILL for a run whose stage has passed a step: the place of its training."""
    trainings = here.store / "training"
    known = {*trainings.iterdir()}  # those of other tests, too
    command = [COMMAND, "run", "tiny", "--store", str(here.store), *changes]
    with subprocess.Popen(
        command, env=here.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        place = wait_for_points(trainings, known, process, stage, step)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, f"left over: {alive}"
    return place


def wait_for_points(
    trainings: Path, known: set[Path], process: subprocess.Popen, stage: str, step: int
) -> LocalFolder:
    """Place of the stage's new training, once it has passed `step`."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        for path in {*trainings.glob(f"{stage}-*")} - known:
            points = spooled_points(LocalFolder(path))
            if points and points[-1]["step"] >= step:
                return LocalFolder(path)
        time.sleep(0.2)
    pytest.fail(f"no point of step {step} within 240 s")


@pytest.mark.rest
def test_damaged_shards_stop_training_with_their_name(chain, tmp_path):
    """The workers read the tars themselves: a flipped byte in one is found and named."""
    here, _ = chain
    tar = next(folder_of(chain, "prepare").glob("train-*.tar"))
    whole = tar.read_bytes()
    try:
        damaged = bytearray(whole)
        damaged[600] ^= 1
        tar.write_bytes(damaged)
        done = here.sdn("run", "tiny", "--store", str(here.store), "--set", "stage_one.seed=7")
    finally:
        tar.write_bytes(whole)
    assert done.returncode == 1
    assert tar.name in done.stderr
    assert "Traceback" not in done.stderr

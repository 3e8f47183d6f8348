"""Data sets from the command line, as a user prepares, appends, damages and mends them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from places import COMMAND, Place, place


def draw(folder: Path, first: int, count: int, size: int = 48) -> None:
    """Images of their own, each with a caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{number:04d}.png")
        (folder / f"picture{number:04d}.txt").write_text(f"picture number {number}\n")


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def answer(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


SMALL = ("--set", "resolution=32", "--set", "shard_samples=100")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = place(tmp_path_factory.mktemp("data"))
    draw(found.store.parent / "pictures", 0, 900)
    return found


@pytest.mark.rest
def test_one_and_two_workers_write_the_same_bytes(here):
    """Two runs, with one worker and with two, give the same files, byte for byte."""
    root = here.store.parent
    for name, cpus in (("one", "1"), ("two", "2"), ("again", "2")):
        env = here.env | {"SDN_CPUS": cpus}
        done = Place(here.store, env).sdn(
            "prepare", "folder", str(root / "pictures"), "--out", str(root / name), *SMALL
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert digests(root / "one") == digests(root / "two") == digests(root / "again")
    assert answer(here.sdn("verify", str(root / "one"), "--json"))["damages"] == []


@pytest.mark.rest
def test_a_killed_preparation_goes_on(here):
    """Killed in the middle it leaves no data set; run again it ends with the same bytes."""
    root = here.store.parent
    out = root / "killed"
    command = (COMMAND, "prepare", "folder", str(root / "pictures"), "--out", str(out), *SMALL)
    process = subprocess.Popen(command, env=here.env, cwd=root)
    deadline = time.monotonic() + 120
    while not list(out.glob("unfinished/parts/*.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    tree = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(tree, timeout=30)
    assert not (out / "manifest.json").exists()
    refused = here.sdn("verify", str(out))
    assert refused.returncode == 1
    assert "holds no data set" in refused.stdout
    begun = {path.name for path in out.glob("unfinished/parts/*.json")}
    assert begun
    answer(here.sdn(*command[1:], "--json"))
    fresh = root / "fresh"
    answer(here.sdn(*command[1:4], "--out", str(fresh), *SMALL, "--json"))
    assert digests(out) == digests(fresh)


@pytest.mark.rest
def test_append_log_diff_letters_retry(here):
    """The life of a data set: new pictures, a broken one, its mending, and the history of it."""
    root = here.store.parent
    source, out = root / "life", str(root / "life-set")
    draw(source, 0, 30)
    prepare = ("prepare", "folder", str(source), "--out", out, *SMALL, "--json")
    first = answer(here.sdn(*prepare))
    assert sum(first["samples"].values()) == 30
    again = here.sdn(*prepare)
    assert again.returncode == 1
    assert "already holds a finished data set" in again.stderr

    draw(source, 30, 9)
    (source / "torn.png").write_bytes((source / "picture0030.png").read_bytes()[:300])
    (source / "torn.txt").write_text("a torn picture\n")
    over = here.sdn(*prepare, "--append")
    assert over.returncode == 1
    assert "more than data.failure_budget allows (1.0%)" in over.stderr
    assert "torn" in over.stderr
    lenient = (*prepare, "--append", "--set", "failure_budget=0.5")
    second = answer(here.sdn(*lenient))
    assert (second["version"], second["parent"]) == (2, first["manifest"])
    assert sum(second["samples"].values()) == 39
    assert second["dead_letters"] == 1
    (letter,) = answer(here.sdn("data", "letters", out, "--json"))["dead_letters"]
    assert (letter["key"], letter["where"]) == ("torn", "torn.png")
    assert Path(out, letter["original"]).read_bytes() == (source / "torn.png").read_bytes()

    shutil.copy(source / "picture0031.png", source / "torn.png")
    third = answer(here.sdn("data", "retry", out, "--json"))
    assert (third["mended"], third["dead_letters"]) == (1, 0)
    assert answer(here.sdn("data", "retry", out, "--json"))["mended"] == 0

    log = answer(here.sdn("data", "log", out, "--json"))["versions"]
    assert [version["version"] for version in log] == [3, 2, 1]
    diff = answer(here.sdn("data", "diff", f"{out}@1", f"{out}@3", "--json"))
    assert sum(diff["counts"]["came"].values()) == 10
    assert sum(diff["counts"]["gone"].values()) == 0
    shown = here.sdn("data", "log", out).stdout
    assert first["manifest"][:12] in shown
    assert "10" in here.sdn("data", "diff", f"{out}@1", out).stdout
    assert here.sdn("verify", out).stdout.strip().endswith("whole")


@pytest.mark.rest
def test_too_many_dead_letters_stop_a_run_before_training(here):
    """The run fails in its first stage; terminal and MLflow show what could not be used."""
    root = here.store.parent
    source = root / "bad"
    draw(source, 0, 20)
    for number in range(5):
        (source / f"picture{number:04d}.png").write_bytes(b"<html>404</html>")
    done = here.sdn(
        "run", "folder", "--store", str(root / "bad-store"), "--set", f"data.path={source}"
    )
    assert done.returncode == 1
    assert "5 of 20 records (25.0%) cannot be used" in done.stderr
    assert "picture0003" in done.stderr
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{root / 'bad-store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sdn-folder")
    (failed,) = client.search_runs([experiment.experiment_id])
    assert failed.info.status == "FAILED"
    path = client.download_artifacts(failed.info.run_id, "dead-letters.json")
    table = json.loads(Path(path).read_text())
    assert len(table["data"]) == 5


FASHION = Path(__file__).parents[3] / "shared" / "data" / "fashion"


@pytest.mark.rest
@pytest.mark.skipif(not FASHION.is_dir(), reason=f"no development data at {FASHION}")
def test_a_real_collection_with_duplicates(here):
    """39,800 product photos: the test images that are in training, too, are found and kept out."""
    out = str(here.store.parent / "fashion")
    settings = ("resolution=32", "image_format=jpg", "shard_samples=2000", "duplicates=hold-out")
    changes = [part for setting in settings for part in ("--set", setting)]
    found = answer(here.sdn("prepare", "parquet", str(FASHION), "--out", out, *changes, "--json"))
    assert found["duplicates"]["pixels, in test and train"] >= 42
    assert found["duplicates"]["words, in test and train"] >= 297
    assert found["samples"]["test"] == 4509
    kept_out = found["exclusions"]["the same image is in the test split"]
    assert kept_out >= 42
    assert found["samples"]["train"] == 35291 - kept_out
    assert found["dead_letters"] == 0

import json
import os
import re
import socket
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines import forecasting
from pipelines.cli import app
from sdn.forecast import Measured
from sdn.recipes import RECIPES


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    """Commands stand in an empty folder, with nothing of the environment that changes them."""
    for name in ("STORE", "CACHE", "TRACKING_URI", "RAY_ADDRESS", "S3_ENDPOINT", "TRACEBACK"):
        monkeypatch.delenv(f"SDN_{name}", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = dict(os.environ)
    yield
    os.environ.clear()  # commands set variables for the libraries that they call
    os.environ.update(before)


def sdn(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def answer(done):
    """The one JSON object in the last line of standard output."""
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def refused(done, *words):
    """Exit 1 and one clear text with all of these words; no traceback, no answer."""
    assert done.exit_code == 1, done.output
    assert re.search("^error: ", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.output
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


def pictures(folder, count=12):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for n in range(count):
        values = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"p{n}.png")
        (folder / f"p{n}.txt").write_text(f"picture number {n}\na picture, the {n}th\n")
    return folder


def prepare(folder, out, *args):
    return sdn("prepare", "folder", folder, "--out", out, "--set", "resolution=32", *args)


@pytest.mark.parametrize("server", ["mlflow", "prefect"])
def test_a_port_in_use(server, tmp_path):
    """A port in use and the option for another are named before anything is written."""
    store = tmp_path / "store"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = sdn("ui", "--store", store, f"--{server}-port", port)
    refused(done, f"port {port}", "in use", f"--{server}-port {port + 1}")
    assert not store.exists()


def test_ui_beside_a_configured_server(monkeypatch):
    """Where the servers are configured, the address to open is named."""
    monkeypatch.setenv("SDN_TRACKING_URI", "http://127.0.0.1:5001")
    refused(sdn("ui"), "http://127.0.0.1:5001", "SDN_TRACKING_URI")


def test_recipes():
    """`sdn recipes` names all runs with what they are, as a table and as JSON."""
    done = sdn("recipes", "--json")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 1
    found = answer(done)
    assert set(found) == set(RECIPES)
    assert all(found.values())
    table = sdn("recipes").stdout
    assert all(name in table for name in RECIPES)


def test_unknown_recipe():
    """A typing error in the recipe is answered with the recipes there are."""
    refused(sdn("run", "nope"), "no recipe 'nope'", *RECIPES)


@pytest.mark.parametrize("json_too", [(), ("--json",)])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("foo.bar=1", ["unknown config key 'foo.bar'", "data", "stage_two"]),
        ("data.resolutoin=64", ["did you mean data.resolution?"]),
        ("data.resolution=50", ["multiple of 32", "50", "try 64"]),
        ("workers=5", ["workers must divide lanes (48)", "1, 2, 3, 4, 6"]),
        ("teacher.arch=resnet", ["teacher.arch must be one of", "vgg19", "resnet"]),
        ("noequals", ["expected key=value", "'noequals'", "stage_two.epochs=3"]),
        ("=3", ["expected key=value", "'=3'"]),
    ],
)
def test_impossible_change(change, words, json_too, tmp_path):
    """A change that cannot be made is refused before anything is written."""
    store = tmp_path / "store"
    refused(sdn("run", "tiny", "--store", store, "--set", change, *json_too), *words)
    assert not store.exists()


def test_the_version_is_that_of_the_installed_package():
    """One line, by which a report of an error can say what it is about."""
    done = sdn("--version")
    assert (done.exit_code, done.output) == (0, f"sdn {metadata.version('sdn')}\n")


def test_dry_run_for_people(monkeypatch):
    """Without --json a dry run shows the config and each stage's row, and needs no store."""
    made = Measured(
        images_per_s=10.0,
        batch=16,
        memory_gib=1.0,
        parameters=10**6,
        checkpoint_bytes=2**20,
        precision="float32",
    )
    monkeypatch.setattr(forecasting, "_measured", lambda *_: made)
    done = sdn("run", "tiny", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "vgg11" in done.output
    for stage in ("teacher", "captions", "stage", "search"):  # the others are wrapped
        assert f"│ {stage} " in done.output


def test_run_with_a_store_that_cannot_be_written(tmp_path):
    """A run asks its store before any work, and says what to do."""
    (tmp_path / "file").write_bytes(b"")
    done = sdn("run", "tiny", "--store", tmp_path / "file" / "store")
    refused(done, "cannot be written", str(tmp_path / "file" / "store"), "--store")


def test_unknown_store_scheme():
    """An address of an unknown kind is refused with the known kinds."""
    refused(sdn("run", "tiny", "--store", "gs://bucket"), "gs://", "s3://bucket/prefix")


def test_prepare_then_verify(tmp_path):
    """A folder becomes a data set that is whole, until one byte of it is flipped."""
    out = tmp_path / "out"
    done = prepare(pictures(tmp_path / "pictures"), out, "--json")
    assert done.exit_code == 0, done.output
    found = answer(done)
    assert found["folder"] == str(out)
    assert sum(found["samples"].values()) == 12
    assert found["dead_letters"] == 0

    whole = sdn("verify", out, "--json")
    assert whole.exit_code == 0, whole.output
    assert answer(whole) == {"uri": str(out), "damages": []}
    assert "whole" in sdn("verify", out).stdout

    shard = next(iter(sorted(out.glob("train-*.tar"))))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    damaged = sdn("verify", out, "--json")
    assert damaged.exit_code == 1
    damages = answer(damaged)["damages"]
    assert damages
    assert any(shard.name in damage for damage in damages)
    spoken = sdn("verify", out)
    assert spoken.exit_code == 1
    assert re.search(rf"damaged: .*{shard.name}", spoken.stdout)


def test_verify_where_nothing_is(tmp_path):
    """A folder without a data set is not whole, and the text names it."""
    done = sdn("verify", tmp_path / "nothing")
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert str(tmp_path / "nothing") in done.output


def test_prepare_refuses_a_finished_folder(tmp_path):
    """A finished data set is never rewritten."""
    folder, out = pictures(tmp_path / "pictures"), tmp_path / "out"
    assert prepare(folder, out).exit_code == 0
    before = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    refused(prepare(folder, out), "already holds a finished data set", str(out))
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_prepare_with_missing_captions(tmp_path):
    """Too many images without caption are refused by name, with how to go on without them."""
    folder = pictures(tmp_path / "pictures")
    for n in (3, 4):
        (folder / f"p{n}.txt").unlink()
    done = prepare(folder, tmp_path / "out")
    refused(done, "2 of 12", "p3.png", "expected p3.txt", "data.failure_budget")
    lenient = prepare(folder, tmp_path / "other", "--set", "failure_budget=0.5", "--json")
    assert lenient.exit_code == 0, lenient.output
    assert answer(lenient)["dead_letters"] == 2
    assert sum(answer(lenient)["samples"].values()) == 10


def test_prepare_without_any_caption(tmp_path):
    """A folder of images alone is answered with the layout that is expected."""
    folder = pictures(tmp_path / "pictures")
    for path in folder.glob("*.txt"):
        path.unlink()
    refused(prepare(folder, tmp_path / "out"), "no image with a caption", "bird.txt")


def test_prepare_with_an_unreadable_image(tmp_path):
    """An image that cannot be decoded is named with the reason."""
    folder = pictures(tmp_path / "pictures")
    (folder / "p5.png").write_bytes(b"this is no picture")
    refused(prepare(folder, tmp_path / "out"), "1 of 12", "p5", "data.failure_budget")


def test_prepare_into_a_place_that_cannot_be_written(tmp_path):
    """A place below a file is refused with its path."""
    (tmp_path / "file").write_bytes(b"")
    out = tmp_path / "file" / "out"
    refused(prepare(pictures(tmp_path / "pictures"), out), str(out))


def test_prepare_from_nothing(tmp_path):
    """A folder that is not there, or an unknown source, is named."""
    refused(prepare(tmp_path / "nothing", tmp_path / "out"), str(tmp_path / "nothing"), "folder")
    done = sdn("prepare", "imagenet", "--out", tmp_path / "out")
    refused(done, "imagenet", "folder", "openmoji", "cub")
    assert not (tmp_path / "out").exists()


def test_weights_from_nowhere(tmp_path):
    """An empty shell variable does not start a whole search."""
    done = sdn("run", "tiny", "--store", tmp_path / "store", "--weights-from", "")
    refused(done, "--weights-from is empty", "leave the option out")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("generate",), "[default: the champion registered last]"),
        (("generate",), "[default: SDN_STORE, else runs]"),
        (("play",), "[default: the champion registered last, and the one before it]"),
        (("serve", "mlflow"), "[default: SDN_DATABASE; with a password there]"),
    ],
)
def test_help_says_what_is_taken_by_default(command, words):
    """Also where it is no single value."""
    done = sdn(*command, "--help")
    assert words in " ".join(done.output.replace("│", " ").split())


def test_generate_with_nothing_registered(tmp_path):
    """Without a champion, `sdn generate` says how to get one and draws nothing."""
    done = sdn("generate", "a bird", "--store", tmp_path / "store")
    refused(done, "nothing is registered", "sdn run", "--model", "--store")
    assert list((tmp_path / "here").iterdir()) == []


def test_generate_several_images_into_one_file(tmp_path):
    """Refused before a model is looked for: nothing is drawn in vain."""
    done = sdn("generate", "a bird", "--each", "2", "--out", "bird.png", "--store", tmp_path / "no")
    refused(done, "bird.png names one file, but 2 images are drawn", "name a folder")


def test_a_refusal_is_one_line(tmp_path):
    """In a process of its own, a refusal is the only thing that is said."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "generate", "a bird", "--store", "store"],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nothing is registered in store")


def test_generate_with_an_unknown_model(tmp_path):
    """A model that is no folder and not registered is named."""
    done = sdn("generate", "a bird", "--store", tmp_path / "store", "--model", "models:/nope/3")
    refused(done, "nope")


def test_doctor(tmp_path):
    """`sdn doctor` answers with each thing looked at; what is amiss carries a remedy."""
    done = sdn("doctor", "--store", tmp_path / "store", "--json")
    checks = answer(done)["checks"]
    named = {check["what"]: check for check in checks}
    assert {"Python", "torch", "device", "memory", "disk", "store", "Ray"} <= set(named)
    assert named["store"]["ok"]
    assert all(check["found"] for check in checks)
    assert all(check["remedy"] for check in checks if not check["ok"])
    assert done.exit_code == (0 if all(check["ok"] for check in checks) else 1)


def test_doctor_with_a_store_that_cannot_be_written(tmp_path):
    """A store that cannot be written is a finding, not an error of the doctor."""
    (tmp_path / "file").write_bytes(b"")
    done = sdn("doctor", "--store", tmp_path / "file" / "store", "--json")
    assert done.exit_code == 1
    (store,) = [c for c in answer(done)["checks"] if c["what"] == "store"]
    assert not store["ok"]
    assert "cannot be written" in store["remedy"]

"""The registered model behind `mlflow models serve`, and in an environment of its own."""

from __future__ import annotations

import base64
import io
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import venv
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import registered_model
from PIL import Image
from registered_model import CAPTIONS, SEEDS

from pipelines.registry import model_folder

TORCH = "2.13.0"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store with one registered model."""
    found = registered_model.place(tmp_path_factory.mktemp("serving"))
    found.register()
    return found


@contextmanager
def running(command, env, log):
    """A process that is ended with all it started, by their ids."""
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        yield process
    finally:
        parent = psutil.Process(process.pid)
        tree = [*parent.children(recursive=True), parent]
        for part in tree:
            part.terminate()
        _, alive = psutil.wait_procs(tree, timeout=20)
        for part in alive:
            part.kill()


@pytest.fixture(scope="module")
def served(place):
    """Address of the served model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    binaries = Path(sys.executable).parent
    env = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{place.store}/mlflow.db",
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",  # it starts uvicorn by name
    }
    command = [str(binaries / "mlflow"), "models", "serve", "--model-uri", "models:/sdn-small/1"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    log = place.store / "serve.log"
    with running(command, env, log) as process:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 240
        while True:
            try:
                if httpx.get(f"{address}/ping", timeout=5).is_success:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.3)
        yield f"{address}/invocations"


def post(address, **content):
    return httpx.post(address, json=content, timeout=60)


@pytest.mark.timeout(600)
def test_the_server_draws_what_the_evaluation_wrote(served, place):
    """Each sample's PNG comes over HTTP byte for byte and can be decoded; latency is printed."""
    seconds = []
    for number, (caption, seed) in enumerate(zip(CAPTIONS, SEEDS, strict=True)):
        for _ in range(5):
            began = time.perf_counter()
            answer = post(served, inputs=[caption], params={"seed": seed})
            seconds.append(time.perf_counter() - began)
        assert answer.status_code == 200, answer.text
        png = base64.b64decode(answer.json()["predictions"][0])
        assert png == (place.samples / f"{number:02d}.png").read_bytes()
        with Image.open(io.BytesIO(png)) as image:
            assert (image.format, image.size, image.mode) == ("PNG", (32, 32), "RGB")
            assert len(np.unique(np.asarray(image))) > 2
    print(f"latency: median {statistics.median(seconds) * 1e3:.1f} ms, "
          f"slowest {max(seconds) * 1e3:.1f} ms of {len(seconds)}")  # fmt: skip


@pytest.mark.timeout(600)
def test_the_server_draws_batches(served, place):
    """Several captions, in each form that MLflow's protocol has, come back in their order."""
    wanted = [(place.samples / f"{n:02d}.png").read_bytes() for n in (0, 1)]
    for content in (
        {"inputs": list(CAPTIONS[:2])},
        {"instances": list(CAPTIONS[:2])},
        {"dataframe_split": {"columns": ["caption"], "data": [[c] for c in CAPTIONS[:2]]}},
        {"dataframe_records": [{"caption": c} for c in CAPTIONS[:2]]},
    ):
        answer = post(served, **content)
        assert answer.status_code == 200, answer.text
        assert [base64.b64decode(one) for one in answer.json()["predictions"]] == wanted


@pytest.mark.timeout(600)
def test_the_server_takes_a_noise_scale(served, place):
    """A number or null; this model has no noise, so any draws the same; others are refused."""
    wanted = (place.samples / "00.png").read_bytes()
    for scale in (0, 1.5, None):
        answer = post(served, inputs=[CAPTIONS[0]], params={"noise_scale": scale})
        assert answer.status_code == 200, answer.text
        assert base64.b64decode(answer.json()["predictions"][0]) == wanted
    answer = post(served, inputs=[CAPTIONS[0]], params={"noise_scale": 4})
    assert answer.status_code == 400, answer.text
    assert "noise_scale must be 0..3, not 4" in answer.json()["message"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (["a cat", ""], "caption number 2 of 2: .*no letter or digit"),
        (["y" * 41], "caption of 41 characters, the encoder reads at most 40"),
        (["a cat", "y" * 41, "a dog"], "caption number 2 of 3: .*at most 40"),
        ([3], "a caption must be text, not int: 3"),
        (["a cat", 3], "caption number 2 of 2: a caption must be text, not int"),
        (["a cat", None], "caption number 2 of 2: a caption must be text, not NoneType"),
        ([], "declares 1 inputs"),
    ],
)
def test_bad_captions_are_the_callers_fault(served, inputs, text):
    """What cannot be drawn is answered with status 400 and the reason, never drawn or a 500."""
    answer = post(served, inputs=inputs)
    assert answer.status_code == 400, answer.text
    assert re.search(text, answer.json()["message"])


@pytest.mark.rest
@pytest.mark.timeout(1800)
def test_the_recorded_environment_installs_and_draws(place, tmp_path):
    """In a fresh environment with nothing but the recorded requirements the model loads and draws
    the samples' pixels."""
    folder, _, _ = model_folder(place.tracker.settings, "models:/sdn-small/1")
    logged = folder.parents[1]
    assert f"torch=={TORCH}" in (logged / "requirements.txt").read_text().splitlines()
    venv.create(tmp_path / "fresh", with_pip=True)
    python = str(tmp_path / "fresh" / "bin" / "python")
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}

    def run(*command):
        done = subprocess.run(
            [python, *command],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    install = ("-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(*install, f"torch=={TORCH}")
    run(*install, "-r", str(logged / "requirements.txt"))
    found = run(
        "-c",
        "import io, json, sys, importlib.util as u\n"
        "import mlflow, numpy as np\n"
        "from pathlib import Path\n"
        "from PIL import Image\n"
        "assert not any(u.find_spec(n) for n in ('pipelines', 'ray', 'prefect', 'webdataset'))\n"
        "model, samples = mlflow.pyfunc.load_model(sys.argv[1]), Path(sys.argv[2])\n"
        "read = lambda source: np.asarray(Image.open(source)).astype(int)\n"
        "for one in json.loads((samples / 'samples.json').read_text())['samples']:\n"
        "    (png,) = model.predict([one['caption']], params={'seed': one['seed']})\n"
        "    apart = abs(read(io.BytesIO(png)) - read(samples / one['file'])).max()\n"
        "    print(apart)\n",
        str(logged),
        str(place.samples),
    )
    # Another build of torch may round the last bit otherwise.
    assert all(int(line) <= 1 for line in found.split()[-len(CAPTIONS) :])

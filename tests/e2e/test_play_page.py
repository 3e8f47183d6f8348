"""`sdn play` as a person uses it: type, look, download, Ctrl-C."""

from __future__ import annotations

import base64
import io
import re
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

import httpx
import pytest
from browser import browser_page
from PIL import Image
from places import COMMAND, free_port

from sdn.sampling import open_synthesizer, save_synthesizer
from sdn.stage_run import CONFIG
from sdn.student import Student
from sdn.taps import blocks_of

WIDTH = 0.05
CAPTION = "woman cook: dark skin tone"


def lively_model(here, folder, noise=0):
    """A model folder whose picture differs from caption to caption.

    The training of the tiny recipe is so short that its own model may draw one picture for all.
    """
    trained = next((here.store / "stages").glob("stage_two-*/student.safetensors")).parent
    folder.mkdir()
    model = open_synthesizer(trained)
    student = Student(
        blocks_of("vgg11", WIDTH),
        resolution=model.resolution,
        text_dim=model.encoder.dim,
        width=WIDTH,
        init="he",
        seed=1,
        noise=noise,
    )
    settings = {
        "blocks": [list(block) for block in student.blocks],
        "resolution": model.resolution,
        "text_dim": model.encoder.dim,
        "width": WIDTH,
        "noise": noise,
        "noise_scale": 1.5,
    }
    save_synthesizer(folder, model.encoder, student.state_dict(), settings, model.max_chars)
    (folder / CONFIG).write_bytes((trained / CONFIG).read_bytes())
    return folder


@contextmanager
def playing(chain, folder, noise=0):
    """A page of the registered model and a lively one; its address. Ends with Ctrl-C and exit 0."""
    here, answer = chain
    # By name: whether it is the champion is decided elsewhere.
    models = (
        "--model",
        answer["model"]["uri"],
        "--model",
        str(lively_model(here, folder / "m", noise)),
    )
    port = free_port()
    log = folder / "play.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [COMMAND, "play", "--store", str(here.store), "--port", str(port), *models],
            env=here.env, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while "Ctrl-C ends it" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert f"page: http://127.0.0.1:{port}" in log.read_text()
        assert re.search(r"read ([\d,]+) of \1 training images", log.read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=60)
        print(f"ended {time.monotonic() - asked:.2f} s after Ctrl-C")
    assert status == 0, log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def played(chain, tmp_path_factory):
    """One running page for the tests that only look at it: its address."""
    with playing(chain, tmp_path_factory.mktemp("play")) as url:
        yield url


def shown(page, caption):
    """Wait until the page shows the answer to this caption; the lively model's pixels."""
    page.wait_for_function("text => document.body.dataset.shown === text", arg=caption)
    # Not the file: that differs by the caption in it.
    source = page.locator(".drawn img").nth(1).get_attribute("src")
    png = base64.b64decode(source.partition(",")[2])
    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


def test_typing_draws(chain, played, tmp_path):
    """Letter by letter the picture changes, training images beside it; the PNG knows its model."""
    _, answer = chain
    with browser_page() as page:
        problems, requests = [], []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(played)
        # The first example is drawn by itself.
        shown(page, page.input_value("#caption"))
        page.fill("#caption", "")
        pictures = []
        for n, letter in enumerate(CAPTION[:8], start=1):
            page.locator("#caption").press_sequentially(letter)
            pictures.append(shown(page, CAPTION[:n]))
        assert len(set(pictures)) >= 7  # "woman" and "woman " are the same words
        page.locator("#caption").press_sequentially(CAPTION[8:], delay=30)
        last = shown(page, CAPTION)
        assert last not in pictures
        print(page.inner_text("#latency"), "|", page.inner_text(".took"))
        names = page.locator("h2").all_inner_texts()
        assert names[0] == f"{answer['model']['name']} version {answer['model']['version']}"
        assert len(names) == 2
        assert page.locator(".near li").count() == 6
        near = page.locator(".model").first.locator(".near li")
        assert near.count() == 3
        for n in range(3):
            caption, key, difference = near.nth(n).inner_text().split("\n")[:3]
            assert caption
            assert key
            assert re.fullmatch(r"difference [\d.]+", difference)
            width = near.nth(n).locator("img").evaluate("image => image.naturalWidth")
            assert width == page.locator(".drawn img").first.evaluate("image => image.naturalWidth")
        with page.expect_download() as download:
            page.locator(".save").first.click()
        assert download.value.suggested_filename == "woman-cook-dark-skin-tone.png"
        text = Image.open(io.BytesIO(download.value.path().read_bytes())).text
        assert text["sdn:model"] == answer["model"]["name"]
        assert text["sdn:version"] == str(answer["model"]["version"])
        assert text["sdn:uri"] == answer["model"]["uri"]
        assert (text["sdn:caption"], text["sdn:seed"]) == (CAPTION, "0")
        page.screenshot(path=str(tmp_path / "play.png"), full_page=True)
        assert Image.open(tmp_path / "play.png").width == 1280
        assert problems == []
        elsewhere = [one for one in requests if not one.startswith((played, "data:"))]
        assert elsewhere == []


def test_errors_stand_beside_the_field(played):
    """What cannot be drawn is told on the page and leaves the last picture; then it goes on."""
    with browser_page(400, 800) as page:
        page.goto(played)
        page.fill("#caption", "a cat")
        before = shown(page, "a cat")
        for bad, words in (("!!!", "no letter"), ("x" * 500, "at most"), ("", "no letter")):
            page.fill("#caption", bad)
            assert shown(page, bad) == before
            assert words in page.inner_text("#error")
            assert page.locator(".model:not(.stale)").count() == 0
        page.click("#examples button >> nth=1")
        assert shown(page, page.input_value("#caption")) != before
        assert page.inner_text("#error") == ""
        assert page.locator(".stale").count() == 0
        assert page.locator("#seed").is_disabled()
        assert "no noise" in page.inner_text("#about-seed")
        # Nothing is wider than a phone.
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_seed_and_noise_where_a_model_has_some(chain, tmp_path):
    """Another seed or noise scale is another picture; the empty field is the model's own again."""
    with browser_page(400, 800) as page, playing(chain, tmp_path, noise=8) as url:
        page.goto(url)
        page.fill("#caption", "a cat")
        own = shown(page, "a cat")

        def changed(field, content):
            before = int(page.evaluate("document.body.dataset.number"))
            page.fill(field, content)
            page.wait_for_function("n => Number(document.body.dataset.number) > n", arg=before)
            return shown(page, "a cat")

        assert page.get_attribute("#noise", "placeholder") == "1.5"
        still = changed("#noise", "0")
        assert still != own
        assert changed("#seed", "7") == still
        assert changed("#noise", "1.5") != own
        assert changed("#seed", "0") == own
        assert changed("#noise", "0.5") not in (own, still)
        assert changed("#noise", "") == own
        changed("#noise", "3.5")
        assert "Noise: Input should be less than or equal to 3" in page.inner_text("#error")
        assert page.locator("[aria-invalid=true]").evaluate_all(
            "all => all.map(one => one.id)"
        ) == ["noise"]
        page.locator("#noise").press("End")
        page.locator("#noise").press_sequentially("-")
        page.wait_for_function(
            "() => document.querySelector('#error').textContent.includes('number')"
        )
        assert page.locator(".model:not(.stale)").count() == 0
        assert changed("#noise", "") == own
        assert page.locator("[aria-invalid=true]").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_markup_in_a_caption_stays_text(played):
    """A caption with markup is drawn, and nothing of it becomes part of the page."""
    hostile = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
    with browser_page() as page:
        page.goto(played)
        images = page.locator("img").count()
        page.fill("#caption", hostile)
        shown(page, hostile)
        assert page.title() == "sdn play"
        assert page.locator("img[src=x]").count() == 0
        assert page.locator("script").count() == 1
        assert page.locator("img").count() >= images


def test_another_page_cannot_drive_it(chain, tmp_path):
    """A foreign name or origin is refused; a page that ended is told of in words."""
    with browser_page() as page:
        with playing(chain, tmp_path) as url:
            ask = {"caption": "a cat"}
            foreign = {"Origin": "https://evil.example"}
            assert httpx.post(f"{url}/draw", json=ask).status_code == 200
            assert httpx.post(f"{url}/draw", json=ask, headers=foreign).status_code == 403
            other = httpx.get(url, headers={"Host": "evil.example"})
            assert other.status_code == 400
            page.goto(url)
            page.fill("#caption", "a cat")
            shown(page, "a cat")
        page.fill("#caption", "a dog")
        shown(page, "a dog")
        assert "sdn play does not run any more" in page.inner_text("#error")


def test_a_port_in_use(chain):
    """A taken port ends it before anything is loaded, and the text names another one."""
    here, _ = chain
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = here.sdn("play", "--store", str(here.store), "--port", str(port))
    assert done.returncode == 1
    assert f"port {port} for the page is in use" in done.stderr
    assert f"--port {port + 1}" in done.stderr
    assert "loading" not in done.stderr

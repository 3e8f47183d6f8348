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
from browser import browser_page
from conftest import COMMAND, free_port
from PIL import Image

CAPTION = "woman cook: dark skin tone"


@contextmanager
def playing(here, folder, *options):
    """A page that answers; yields its address, ends with Ctrl-C and exit 0."""
    port = free_port()
    log = folder / "play.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [COMMAND, "play", "--store", str(here.store), "--port", str(port), *options],
            env=here.env, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while "Ctrl-C ends it" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert f"page: http://127.0.0.1:{port}" in log.read_text()
        yield f"http://127.0.0.1:{port}", log
    finally:
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=60)
        print(f"ended {time.monotonic() - asked:.2f} s after Ctrl-C")
    assert status == 0, log.read_text()
    assert "Traceback" not in log.read_text()


def shown(page, caption):
    """Wait until the page shows the answer to this caption; the pixels of its picture."""
    page.wait_for_function("text => document.body.dataset.shown === text", arg=caption)
    # Not the file: that differs by the caption in it.
    png = base64.b64decode(page.get_attribute(".drawn img", "src").partition(",")[2])
    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


def test_typing_draws(chain, tmp_path):
    """Letter by letter the picture changes, training images beside it; the PNG knows its model."""
    here, answer = chain
    with playing(here, tmp_path) as (url, log), browser_page() as page:
        assert "training images" in log.read_text()
        problems, requests = [], []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
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
        near = page.locator(".near li")
        assert near.count() == 3
        for n in range(3):
            caption, key, difference = near.nth(n).inner_text().split("\n")[:3]
            assert caption
            assert key
            assert re.fullmatch(r"difference [\d.]+", difference)
            width = near.nth(n).locator("img").evaluate("image => image.naturalWidth")
            assert width == page.locator(".drawn img").first.evaluate("image => image.naturalWidth")
        with page.expect_download() as download:
            page.click(".save")
        assert download.value.suggested_filename == "woman-cook-dark-skin-tone.png"
        text = Image.open(io.BytesIO(download.value.path().read_bytes())).text
        assert text["sdn:model"] == answer["model"]["name"]
        assert text["sdn:version"] == str(answer["model"]["version"])
        assert text["sdn:uri"] == answer["model"]["uri"]
        assert (text["sdn:caption"], text["sdn:seed"]) == (CAPTION, "0")
        page.screenshot(path=str(tmp_path / "play.png"), full_page=True)
        assert Image.open(tmp_path / "play.png").width == 1280
        assert problems == []
        elsewhere = [one for one in requests if not one.startswith((url, "data:"))]
        assert elsewhere == []


def test_errors_stand_beside_the_field(chain, tmp_path):
    """What cannot be drawn is told on the page and leaves the last picture; then it goes on."""
    here, _ = chain
    with playing(here, tmp_path) as (url, _), browser_page(400, 800) as page:
        page.goto(url)
        page.fill("#caption", "a cat")
        before = shown(page, "a cat")
        for bad, words in (("!!!", "no letter"), ("x" * 500, "at most"), ("", "no letter")):
            page.fill("#caption", bad)
            assert shown(page, bad) == before
            assert words in page.inner_text("#error")
            assert page.locator(".stale").count() == 1
        page.click("#examples button >> nth=1")
        assert shown(page, page.input_value("#caption")) != before
        assert page.inner_text("#error") == ""
        assert page.locator(".stale").count() == 0
        assert page.locator("#seed").is_disabled()
        assert "no noise" in page.inner_text("#about-seed")
        # Nothing is wider than a phone.
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_markup_in_a_caption_stays_text(chain, tmp_path):
    """A caption with markup is drawn, and nothing of it becomes part of the page."""
    here, _ = chain
    hostile = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
    with playing(here, tmp_path) as (url, _), browser_page() as page:
        page.goto(url)
        images = page.locator("img").count()
        page.fill("#caption", hostile)
        shown(page, hostile)
        assert page.title() == "sdn play"
        assert page.locator("img[src=x]").count() == 0
        assert page.locator("script").count() == 1
        assert page.locator("img").count() >= images


def test_another_page_cannot_drive_it(chain, tmp_path):
    """A foreign name or origin is refused; a page that ended is told of in words."""
    here, _ = chain
    with browser_page() as page:
        with playing(here, tmp_path) as (url, _):
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

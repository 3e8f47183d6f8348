"""A person who knows no code: Prefect's form, run and artifacts, MLflow's model, by clicks.

SDN_PICTURES=1 keeps what the README shows of it in infra/readme.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time

import httpx
import pytest
from browser import browser_page
from PIL import Image
from places import ROOT, background, free_port

PATIENCE_MS = 120_000

ARTIFACTS = {
    "data": "train samples",
    "search": "trial",
    "result": "caption match",
    "report": "report.html",
    "decision": "Compared with",
}
"""Beside the config: key -> words that a person finds in it."""


def keep(page, name, clip):
    """A picture for the README, if they are to be kept: few colours, so that it is small."""
    if os.environ.get("SDN_PICTURES") != "1":
        return
    left, top, right, bottom = clip
    area = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    with Image.open(io.BytesIO(page.screenshot(clip=area, full_page=True))) as shot:
        small = shot.convert("RGB").quantize(64, dither=Image.Dither.NONE)
        small.save(ROOT / "infra" / "readme" / name, optimize=True)


def field(page, name):
    """Of a form."""
    return page.get_by_label(re.compile(rf"^{name}( \(Optional\))?$"))


def choose(page, name, option):
    """From the list of a field; one that the page draws anew meanwhile is opened once more."""
    from playwright.sync_api import TimeoutError as TooLate

    for _ in range(5):
        page.get_by_label(f"Select {name}").click()
        try:
            page.get_by_role("option", name=option, exact=True).click(timeout=15_000)
        except TooLate:
            page.keyboard.press("Escape")
        else:
            return
    raise AssertionError(f"{option} of {name} cannot be chosen")


def submit_and_view(page):
    """Start the run and go to its page; a busy server over SQLite says "Unknown error" to some.

    Prefect reads before it writes: a write of another in between makes SQLite refuse its own. The
    server answers 503 (PrefectHQ/prefect issue 18934), which the page does not try again.
    """
    for _ in range(5):
        with page.expect_response(re.compile("/create_flow_run$")) as answer:
            page.get_by_role("button", name="Submit").click()
        if answer.value.status != httpx.codes.SERVICE_UNAVAILABLE:
            break
        page.get_by_text("Unknown error while creating flow run").first.wait_for()
    page.get_by_role("button", name="View run").click()


def until_gone(locator):
    """Wait for it to go."""
    locator.wait_for(state="detached", timeout=PATIENCE_MS)


@pytest.mark.timeout(600)
def test_a_run_is_started_and_watched_by_clicks(chain, server):
    """The form says what is wrong and starts the run; its page shows the end and the artifacts."""
    here, _ = chain
    with browser_page(1100, 900) as page:
        from playwright.sync_api import expect  # there is one, else this was skipped

        page.set_default_timeout(PATIENCE_MS)
        page.goto(server.ui)
        page.get_by_role("link", name="Deployments").click()
        page.get_by_role("link", name="sdn-pipeline").first.click()
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Custom run").click()

        choose(page, "recipe", "tiny")
        choose(page, "workers", "2")
        field(page, "store").fill(str(here.store))
        epochs, resolution = field(page, "stage_two_epochs"), field(page, "resolution")
        epochs.fill("-1")
        page.get_by_role("button", name="Submit").click()
        assert epochs.evaluate("field => field.validity.rangeUnderflow")
        assert "0" in epochs.evaluate("field => field.validationMessage")
        epochs.fill("12")
        resolution.fill("33")
        page.get_by_role("button", name="Submit").click()
        wrong = page.locator("form").get_by_text("33 is not a multiple of 32")
        wrong.wait_for()
        resolution.fill("32")
        until_gone(wrong)
        keep(page, "prefect-form.png", (256, 0, 1100, 1180))
        submit_and_view(page)
        page.get_by_role("tab", name="Artifacts").wait_for()
        watched = page.url
        run = watched.partition("/flow-run/")[2].partition("?")[0]
        page.locator("main").get_by_text("Completed", exact=True).first.wait_for(timeout=240_000)
        page.get_by_role("tab", name="Artifacts").click()
        page.get_by_test_id("flow-run-artifacts-grid").wait_for()
        until_gone(page.get_by_text("scheduled to start now"))
        keep(page, "prefect-run.png", (256, 0, 1100, 900))
        page.get_by_role("link", name=re.compile("resolved-config")).click()
        page.get_by_role("link", name=re.compile(r"^[0-9a-f]{8}$")).first.click()
        shown = page.get_by_test_id("markdown-display")
        expect(shown).to_contain_text('"name": "tiny"', timeout=PATIENCE_MS)
        expect(shown).to_contain_text(str(here.store))
        # The others, each from the run's page.
        for key, words in ARTIFACTS.items():
            page.goto(watched)
            page.get_by_role("tab", name="Artifacts").click()
            page.get_by_test_id("flow-run-artifacts-grid").wait_for()
            page.get_by_role("link", name=re.compile(rf"\b{key}\b")).first.click()
            page.get_by_role("link", name=re.compile(r"^[0-9a-f]{8}$")).first.click()
            page.locator("main").get_by_text(words).first.wait_for()
    mine = [a for a in server.post("artifacts/filter", {}) if a["flow_run_id"] == run]
    mine.sort(key=lambda artifact: artifact["created"])
    assert mine[0]["key"] == "resolved-config"
    # What the recipe says anyway, typed into the form, is what the store holds already.
    keys = {artifact["key"] for artifact in mine}
    assert ARTIFACTS.keys() <= keys
    assert not keys & {"progress-prepare", "progress-stage-one", "progress-stage-two"}


@pytest.mark.timeout(600)
def test_the_model_and_its_report_are_found_by_clicks(chain, tmp_path):
    """From MLflow's first page to the version, to the run that made it, to its report."""
    here, answer = chain
    name, port = answer["model"]["name"], free_port()
    place = f"sqlite:///{here.store / 'mlflow.db'}"
    command = ("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    env = here.env | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    mlflow = (sys.executable, "-m", *command)
    with (
        background(*mlflow, "--backend-store-uri", place, env=env, log=tmp_path / "mlflow.log"),
        browser_page(1400, 900) as page,
    ):
        until = time.monotonic() + 120
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert time.monotonic() < until, (tmp_path / "mlflow.log").read_text()[-2000:]
            time.sleep(0.5)
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_text("Model training", exact=True).first.click()
        page.get_by_role("link", name="Model registry").click()
        page.get_by_role("button", name="Try it now").click()  # what is new in MLflow
        page.get_by_role("link", name=name).first.click()
        page.get_by_role("link", name="Version 1", exact=True).first.click()
        page.get_by_text("Symmetrical Distillation Networks").wait_for()
        page.locator("[data-component-id='mlflow.assistant.chat_panel.close']").click()
        keep(page, "mlflow-model.png", (198, 0, 1400, 860))
        page.get_by_role("link", name="tiny", exact=True).click()
        page.get_by_role("tab", name="Artifacts").click()
        page.get_by_text("report.html", exact=True).click()
        report = page.frame_locator("iframe").first
        heading = report.locator("h1").inner_text()
        told = report.locator("table").first.inner_text()
    assert heading.startswith("tiny: ")
    for words in ("caption match", "KID", "stage one", "stage two", "untrained weights"):
        assert words in told


def answers(url):
    """Whether a server does."""
    try:
        return httpx.get(url, timeout=2).is_success
    except httpx.HTTPError:
        return False

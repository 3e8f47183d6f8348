"""A page in a headless Chromium, for all tests that look at what a person would see."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def browser_page(width=1280, height=900):
    """A fresh page, of this size in CSS pixels; it and its browser are closed at the end.

    Where there is no browser the test is skipped; with CI=true it fails, for there `.ci/run`
    installs one.
    """
    with _playwright()() as playwright:
        browser = playwright.chromium.launch(executable_path=_chromium(), args=list(_ARGUMENTS))
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


def _playwright():
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        _missing("playwright is not installed: pip install playwright")
    return sync_playwright


def _chromium():
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        _missing("no Chromium on this machine (on Debian: apt-get install chromium)")
    return found


def _missing(why):
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{why}; CI=true, so that this test must run")
    pytest.skip(why)

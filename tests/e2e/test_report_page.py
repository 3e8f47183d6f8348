"""The report of an evaluation, as a person sees it: in a browser, on a phone, in print."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import browser_page


@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_stands_alone_and_fits(chain, tmp_path, width):
    """It asks nothing of any network, is no wider than the page, and every picture is there."""
    _, answer = chain
    asked = []
    with browser_page(width) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto(Path(answer["report"]).as_uri())
        page.screenshot(path=tmp_path / f"report-{width}.png", full_page=True)
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert page.evaluate(broken) == 0
        assert page.evaluate("document.images.length") >= 4
        first = page.locator("table").first.inner_text()
        headings = page.locator("h2").all_inner_texts()
        cards = page.locator("figcaption").all_inner_texts()
    for words in ("caption match", "KID", "stage one", "stage two", "untrained weights"):
        assert words in first
    wanted = ["Scores", "Contact sheet", "By class", "Losses", "Data", "Lineage", "Config"]
    assert [heading for heading in headings if heading in wanted] == wanted
    assert all("rank" in card for card in cards)
    assert len(cards) == 16


def test_the_report_prints(chain, tmp_path):
    """Printed, it is a PDF of a few pages."""
    _, answer = chain
    with browser_page() as page:
        page.goto(Path(answer["report"]).as_uri())
        page.pdf(path=tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") <= 40

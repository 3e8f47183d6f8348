"""What the flows tell people of, with which link, and what they keep quiet about."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from uuid import UUID

import pytest
from mlflow import MlflowClient
from prefect.settings import PREFECT_UI_URL, temporary_settings
from prefect.states import Crashed, Failed

from pipelines.flows.notices import failed, tell_of_arrival, tell_of_decision, tell_of_letters
from pipelines.settings import Settings
from sdn.data.dead_letters import TooManyDeadLetters

RUN = UUID("12345678-1234-5678-1234-567812345678")
PAGES = "http://127.0.0.1:4299"
PAGE = f"{PAGES}/runs/flow-run/{RUN}"


@pytest.fixture
def told(monkeypatch, tmp_path):
    """All that a person's command has been told so far."""
    out, script = tmp_path / "told", tmp_path / "command.py"
    script.write_text(
        "import pathlib, sys\n"
        "with pathlib.Path(sys.argv[1]).open('a') as file: print(sys.stdin.read(), file=file)\n"
    )
    monkeypatch.setenv("SDN_NOTIFY_COMMAND", f"{sys.executable} {script} {out}")
    monkeypatch.delenv("SDN_NOTIFY_URL", raising=False)
    with temporary_settings({PREFECT_UI_URL: PAGES}):
        yield lambda: list(map(json.loads, out.read_text().splitlines())) if out.exists() else []


@pytest.fixture
def run(told, tmp_path):
    """A run of a recipe in a store of its own."""
    settings = Settings(store=str(tmp_path / "runs"))
    return SimpleNamespace(settings=settings, config=SimpleNamespace(name="tiny"))


@pytest.mark.parametrize(
    ("state", "title"),
    [
        (Failed(message="MLflow is gone"), "sdn-pipeline failed: brave-owl"),
        (Crashed(message="its process is gone"), "sdn-pipeline crashed: brave-owl"),
    ],
)
def test_a_run_that_fails_is_told_of_once(told, tmp_path, state, title):
    """By the hook of its flow: what, why, and its page; whoever sees it again is quiet."""
    flow = SimpleNamespace(name="sdn-pipeline")
    run = SimpleNamespace(id=RUN, name="brave-owl", parameters={"store": str(tmp_path / "runs")})
    for _ in range(2):
        failed(flow, run, state)
    (notice,) = told()
    assert (notice["kind"], notice["title"]) == ("failure", title)
    assert (notice["text"], notice["link"]) == (state.message, PAGE)


def test_too_many_dead_letters_are_trouble_with_data(told, run):
    """How to see them; the failure of the run that follows is the same event."""
    tell_of_letters(run, TooManyDeadLetters("12 of 40 samples cannot be used", []), RUN)
    (notice,) = told()
    assert (notice["kind"], notice["title"]) == ("data", "tiny: too many dead letters")
    assert notice["text"].startswith("12 of 40 samples cannot be used")
    assert "`sdn data letters`" in notice["text"]
    assert notice["link"] == PAGE
    parameters = {"store": run.settings.store}
    flow_run = SimpleNamespace(id=RUN, name="brave-owl", parameters=parameters)
    failed(SimpleNamespace(name="sdn-pipeline"), flow_run, Failed(message="too many dead letters"))
    assert len(told()) == 1


def report(**changes):
    """Of a version that came without trouble."""
    fine = {
        "place": "photos-set", "version": 3, "came": {"train": 20, "validation": 0, "test": 2},
        "exclusions": {}, "dead_letters": 0, "captions": None, "features": None, "before": None,
        "lengths": {"median": 20, "median_before": 21, "p_value": 0.4},
    }  # fmt: skip
    return SimpleNamespace(key="report-of-3", result=fine | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dead_letters": 2}, "2 could not be used."),
        (
            {"lengths": {"median": 90, "median_before": 21, "p_value": 1e-9}},
            "Length of captions: median 90 characters, before 21; differs beyond chance",
        ),
    ],
)
def test_data_that_need_a_look_are_told_of_once(told, run, changes, said):
    """A version with dead letters, or unlike those before; one like them is not worth a message."""
    tell_of_arrival(run, report(), RUN)
    assert told() == []
    for _ in range(2):
        tell_of_arrival(run, report(**changes), RUN)
    (notice,) = told()
    assert (notice["kind"], notice["link"]) == ("data", PAGE)
    assert notice["title"] == "photos-set: version 3 needs a look"
    assert said in notice["text"]


@pytest.mark.parametrize(
    ("champion", "kind", "title"),
    [
        (True, "promotion", "sdn-tiny version 1 is champion"),
        (False, "rejection", "sdn-tiny version 1 is not promoted"),
    ],
)
def test_a_decision_is_told_of_once(told, run, tmp_path, champion, kind, title):
    """With what it was compared with and why; from another machine it is not told again."""
    client = MlflowClient(f"sqlite:///{tmp_path}/m.db", f"sqlite:///{tmp_path}/m.db")
    client.create_registered_model("sdn-tiny")
    version = client.create_model_version("sdn-tiny", str(tmp_path)).version
    registered = {
        "name": "sdn-tiny", "version": version, "champion": champion, "reason": "KID is lower.",
    }  # fmt: skip
    tracked = SimpleNamespace(tracker=SimpleNamespace(client=client))
    compared = SimpleNamespace(result={"champion": "version 7"})
    tell_of_decision(run, tracked, registered, compared, "file:///report.html")
    elsewhere = SimpleNamespace(settings=Settings(store=str(tmp_path / "other")))
    tell_of_decision(elsewhere, tracked, registered, compared, "file:///report.html")
    (notice,) = told()
    assert (notice["kind"], notice["title"]) == (kind, title)
    assert notice["text"] == "Compared with version 7. KID is lower."
    assert notice["link"] == "file:///report.html"

"""MLflow behind its door: what it may not cost, and which version becomes the champion."""

import logging
import socket

import pytest

from pipelines.generation import find_model
from pipelines.settings import Settings
from pipelines.tracking import CHAMPION, RegistryError, Tracker, never_raising, promote_if_better

NAME = "sdn-some"


@pytest.fixture
def tracker(tmp_path):
    """A tracker on SQLite with a registered model of three versions."""
    found = Tracker(Settings(store=str(tmp_path)), "some")
    found.client.create_registered_model(NAME)
    run = found.run("some", "key")
    for _ in range(3):
        found.client.create_model_version(NAME, source=f"runs:/{run}/model", run_id=run)
    return found


def champion(tracker):
    return str(tracker.client.get_model_version_by_alias(NAME, CHAMPION).version)


def test_the_first_version_becomes_champion(tracker):
    """Where there is no champion the first comes in with any score."""
    assert promote_if_better(tracker, NAME, "1", 0.0, "a")["champion"]
    assert champion(tracker) == "1"


@pytest.mark.parametrize(("score", "expected"), [(0.5, "2"), (0.4, "2"), (0.39, "1")])
def test_a_version_that_is_not_worse_takes_over(tracker, score, expected):
    """Equal or better becomes champion, worse does not, and the reason names the scores."""
    promote_if_better(tracker, NAME, "1", 0.4, "a")
    decision = promote_if_better(tracker, NAME, "2", score, "a")
    assert decision["champion"] == (expected == "2")
    assert champion(tracker) == expected
    if expected == "1":
        assert "0.4000" in decision["reason"]
        assert "0.3900" in decision["reason"]


def test_scores_on_other_images_are_not_compared(tracker):
    """However high, a score on other images changes nothing; the text says how to draw with it."""
    promote_if_better(tracker, NAME, "1", 0.1, "a")
    decision = promote_if_better(tracker, NAME, "2", 0.9, "b")
    assert not decision["champion"]
    assert f"models:/{NAME}/2" in decision["reason"]
    assert champion(tracker) == "1"


def test_asking_again_changes_nothing(tracker):
    """A second run of the same registration leaves the champion as it is."""
    promote_if_better(tracker, NAME, "1", 0.4, "a")
    assert promote_if_better(tracker, NAME, "1", 0.4, "a")["champion"]
    assert champion(tracker) == "1"


@pytest.mark.parametrize("error", [TimeoutError(), ValueError("first\nsecond")])
def test_tracking_never_raises(error, caplog):
    """Whatever tracking throws, without any text too, is one warning."""
    with caplog.at_level(logging.WARNING), never_raising("something"):
        raise error
    assert "something failed" in caplog.text
    assert "second" not in caplog.text


def test_a_run_is_found_again_and_its_failure_forgotten(tracker):
    """The same key is the same run; one that had failed is running again."""
    run = tracker.run("stage", "key")
    tracker.finish(run, "FAILED")
    assert not tracker.finished(run)
    assert tracker.run("stage", "key") == run
    assert tracker.client.get_run(run).info.status == "RUNNING"
    tracker.finish(run)
    assert tracker.finished(run)


@pytest.mark.timeout(60)
def test_a_server_that_is_gone(monkeypatch, tmp_path):
    """A registry that does not answer is named with the remedy, within a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("SDN_TRACKING_URI", f"http://127.0.0.1:{port}")
    for name in ("MAX_RETRIES", "BACKOFF_FACTOR", "TIMEOUT"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    with pytest.raises(RegistryError, match="sdn doctor"):
        find_model(None, str(tmp_path))

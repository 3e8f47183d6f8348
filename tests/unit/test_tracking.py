"""MLflow behind its door: what it may not cost."""

import io
import logging
import re
import socket

import pytest
from PIL import Image

from pipelines.generation import find_model
from pipelines.leaving_out import never_raising
from pipelines.registry import RegistryError
from pipelines.settings import Settings
from pipelines.tracking import Tracker
from sdn.data.files import LocalFolder
from sdn.journal import Journal


@pytest.fixture
def tracker(tmp_path):
    """A tracker on SQLite."""
    return Tracker(Settings(store=str(tmp_path)), "some")


@pytest.mark.parametrize("error", [TimeoutError(), ValueError("first\nsecond")])
def test_tracking_never_raises(error, caplog):
    """Whatever tracking throws, without any text too, is one warning, of MLflow."""
    with caplog.at_level(logging.WARNING), never_raising("something"):
        raise error
    assert "MLflow: something failed" in caplog.text
    assert "second" not in caplog.text


def test_what_prefect_fails_at_is_not_said_of_mlflow(caplog):
    """Whoever reads the warning looks at the server that is away."""
    with caplog.at_level(logging.WARNING), never_raising("Prefect's artifact of the config"):
        raise TimeoutError
    (said,) = caplog.messages
    assert said.startswith("Prefect's artifact of the config failed")


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


def spool(folder, attempt, *steps, value=1.0):
    """Points of these steps, as a rank writes them."""
    with Journal(LocalFolder(folder), f"points/{attempt:04d}", every_s=float("inf")) as journal:
        for step in steps:
            journal.add(step, point(value))


def point(value):
    return {
        "time_ms": 1_700_000_000_000,
        "steps": 1000,
        "images_seen": 16,
        "losses": {f"loss/{n}": value for n in range(22)} | {"loss/total": value},
        "rate": 1e-3,
        "gradient_norm": 2.0,
        "images_per_s": 100.0,
        "waiting_share": 0.0,
        "memory_gib": 1.0,
        "gpu_share": None,
    }


def history(tracker, run, name="loss/total"):
    return [(m.step, m.value) for m in tracker.client.get_metric_history(run, name)]


def test_points_are_mirrored_once(tracker, tmp_path):
    """Mirrored again and again, with new ones in between, each step is there once, none missing."""
    run, place = tracker.run("stage", "key"), LocalFolder(tmp_path / "place")
    for end in (100, 100, 1500):
        spool(tmp_path / "place", 0, *range(20, end + 1, 20))
        tracker.points(run, place)
    expected = [(step, 1.0) for step in range(20, 1501, 20)]
    for name in ("loss/total", "loss/7", "rate", "images_per_s"):
        assert sorted((s, v) for s, v in history(tracker, run, name)) == [
            (step, {"rate": 1e-3, "images_per_s": 100.0}.get(name, v)) for step, v in expected
        ]
    assert history(tracker, run, "gpu_share") == []


def test_steps_done_again_do_not_come_twice(tracker, tmp_path):
    """After a roll-back the steps that MLflow has stay as they are, those it lacks are added."""
    run, place = tracker.run("stage", "key"), LocalFolder(tmp_path / "place")
    spool(tmp_path / "place", 0, 20, 40, 60)
    tracker.points(run, place)
    spool(tmp_path / "place", 1, 40, 60, 80, value=2.0)
    tracker.points(run, place)
    assert history(tracker, run) == [(20, 1.0), (40, 1.0), (60, 1.0), (80, 2.0)]


@pytest.mark.parametrize("after", range(5))
def test_a_mirroring_that_breaks_off_is_made_good(tracker, tmp_path, monkeypatch, after):
    """Whichever request fails, the next mirroring leaves every value of every step once."""
    run, place = tracker.run("stage", "key"), LocalFolder(tmp_path / "place")
    spool(tmp_path / "place", 0, *range(20, 2001, 20))
    log, calls = tracker.client.log_batch, []

    def failing(*args, **values):
        calls.append(1)
        if len(calls) > after:
            raise ConnectionError("gone")
        return log(*args, **values)

    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "log_batch", failing)
        with pytest.raises(ConnectionError):
            tracker.points(run, place)
    tracker.points(run, place)
    for name in ("loss/total", "loss/0", "images_seen"):
        assert [step for step, _ in history(tracker, run, name)] == list(range(20, 2001, 20))


def test_sheets_are_mirrored_once(tracker, tmp_path):
    """Each contact sheet becomes one image of its step."""
    run, place = tracker.run("stage", "key"), LocalFolder(tmp_path / "place")
    for step in (25, 50):
        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "PNG")
        place.write(f"sheets/step-{step:09d}.png", picture.getvalue())
        tracker.sheets(run, place)
        tracker.sheets(run, place)
    names = [f.path for f in tracker.client.list_artifacts(run, "images")]
    for step in (25, 50):
        shown = [name for name in names if re.search(rf"sheet.step.{step}\D.*\.png$", name)]
        assert len(shown) == 1

"""What a dry run measures, forecasts and warns of."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
import training_place
from typer.testing import CliRunner

from pipelines import forecasting
from pipelines.cli import app
from pipelines.forecasting import Limits, forecast
from pipelines.run import RunSpec
from sdn.checkpoint import STATE
from sdn.config import with_overrides
from sdn.data.records import Batch
from sdn.forecast import checkpoint_bytes, measure
from sdn.recipes import recipe
from sdn.running import run_recorded
from sdn.stage_run import new_student, new_trainer
from sdn.teacher import empty_teacher

CPU = torch.device("cpu")
PLENTY = Limits(memory_gib=1e6, disk_gib=1e6)


def test_the_size_of_a_checkpoint_is_that_of_the_file(tmp_path):
    """Forecast and written file differ by less than 2% and the archive's own few bytes."""
    training_place.write_store(tmp_path)
    for average in (0.0, 0.1):
        order = training_place.order_of(tmp_path, f"a{average}", epochs=1, average_share=average)
        trainee, _ = run_recorded(order.opener(), order.place())
        numbers = sum(p.numel() for p in trainee.student.parameters())
        (path,) = order.place().path.glob(f"checkpoints/*/{STATE}")
        expected = checkpoint_bytes(numbers, average=average > 0)
        assert expected < path.stat().st_size < 1.02 * expected + 100_000


def test_the_size_of_a_checkpoint_with_critics(tmp_path):
    """Critics, with their optimizer and what they were drawn with, are part of the file."""
    config = with_overrides(recipe("tiny"), {"student.noise": "4"})
    found = measure(config, "stage_three", device=CPU, threads=1, seconds=1)
    trainer = new_trainer(
        "stage_three",
        new_student(config),
        empty_teacher(config.teacher),
        config.stage_three,
        steps=1,
        tap_means=dict.fromkeys(empty_teacher(config.teacher).names, 1.0),
        precision="float32",
    )
    text = torch.randn(4, config.captions.dim)
    batch = Batch(
        keys=("a", "b", "c", "d"), pixels=torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
        captions=("",) * 4, labels=({},) * 4, epoch=0, step=0, weight=1.0,
    )  # fmt: skip
    trainer.advance(batch, text, 4)
    path = tmp_path / "state.pt"
    torch.save(dataclasses.asdict(trainer.checkpoint()), path)
    assert 0.95 < found.checkpoint_bytes / path.stat().st_size < 1.05


@pytest.mark.parametrize("stage", ["teacher", "captions", "stage_one", "stage_two", "stage_three"])
def test_each_stage_is_measured_in_the_time_given(stage):
    """By the clock alone: once the time is over no further step is begun."""
    ticks = iter(range(10**6))
    found = measure(
        recipe("tiny"), stage, device=CPU, threads=1, seconds=20, clock=lambda: float(next(ticks))
    )
    assert found.images_per_s > 0
    assert found.memory_gib > 0
    assert next(ticks) < 100


def test_a_step_that_is_too_slow_is_measured_with_fewer_images():
    """Where the first step takes most of the time, a smaller batch is timed and says so."""
    now = [0.0]

    def clock():
        now[0] += 30.0
        return now[0]

    found = measure(recipe("tiny"), "stage_one", device=CPU, threads=1, seconds=50, clock=clock)
    assert found.batch < recipe("tiny").stage_one.global_batch


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of the tiny recipe whose measuring is made up: 100 images/s and 2 GiB a worker."""
    monkeypatch.setenv("SDN_CPUS", "2")
    made = measure(recipe("tiny"), "stage_one", device=CPU, threads=1, seconds=1)
    made = dataclasses.replace(
        made, images_per_s=100.0, memory_gib=2.0, checkpoint_bytes=2**30, batch=8
    )
    monkeypatch.setattr(forecasting, "_measured", lambda *_: made)
    monkeypatch.setattr(forecasting, "_samples", lambda _: 3600)
    return RunSpec("tiny", store=str(tmp_path)).open()


def test_hours_follow_from_images_and_rate(run):
    """Images over images a second of all workers; memory of all; all kept checkpoints."""
    found, warnings = forecast(run, lambda text: None, PLENTY)
    assert warnings == []
    two = next(one for one in found if one.stage == "stage_two")
    assert (two.workers, two.images_per_s, two.images) == (2, 200.0, 12 * 3600)
    assert two.hours == pytest.approx(12 * 3600 / 200 / 3600)
    assert (two.memory_gib, two.checkpoint_gib, two.kept_gib) == (4.0, 1.0, 4.0)
    assert [one.stage for one in found] == [
        "teacher",
        "captions",
        "stage_one",
        "search",
        "stage_two",
    ]


def test_a_search_is_forecast_with_every_trial_to_its_end(run):
    """Trials, and full lengths but the one that is stage two; its time limit is for trials."""
    config = with_overrides(
        run.config,
        {"search.trials": "10", "search.images": "7200", "search.reruns": "2"},
    )
    object.__setattr__(run, "config", config)
    found, _ = forecast(run, lambda text: None, PLENTY)
    search = next(one for one in found if one.stage == "search")
    assert search.images == 10 * 7200 + 2 * 12 * 3600
    assert search.hours == pytest.approx(search.images / 200 / 3600)
    assert (search.memory_gib, search.kept_gib) == (8.0, 10 * 1.0 + 2 * 4.0)
    object.__setattr__(run, "config", with_overrides(config, {"search.minutes": "3"}))
    found, _ = forecast(run, lambda text: None, PLENTY)
    search = next(one for one in found if one.stage == "search")
    assert search.hours == pytest.approx(3 / 60 + 2 * 12 * 3600 / 200 / 3600)
    object.__setattr__(run, "config", with_overrides(config, {"search.stage_one": "true"}))
    found, _ = forecast(run, lambda text: None, PLENTY)
    search = next(one for one in found if one.stage == "search")
    assert search.images == 10 * 7200 + 2 * (12 + 3) * 3600
    object.__setattr__(run, "config", with_overrides(config, {"search.trials": "2"}))
    found, _ = forecast(run, lambda text: None, PLENTY)
    search = next(one for one in found if one.stage == "search")
    assert search.images == 2 * 7200 + 12 * 3600
    object.__setattr__(run, "config", with_overrides(config, {"search.trials": "1"}))
    found, _ = forecast(run, lambda text: None, PLENTY)
    assert "search" not in [one.stage for one in found]


def test_few_trials_leave_cores_idle(run, monkeypatch):
    """Two trials of a thread each on eight cores are as fast as a quarter of them."""
    monkeypatch.setattr(forecasting, "cores", lambda settings: 8)
    changes = {"search.trials": "2", "search.images": "7200", "search.reruns": "0"}
    object.__setattr__(run, "config", with_overrides(run.config, changes))
    found, _ = forecast(run, lambda text: None, PLENTY)
    search = next(one for one in found if one.stage == "search")
    two = next(one for one in found if one.stage == "stage_two")
    assert search.images_per_s == two.images_per_s / 4
    assert search.hours == pytest.approx(2 * 7200 / search.images_per_s / 3600)


def test_noise_that_nothing_teaches_is_warned_of(run):
    """Noise needs a stage three; without noise or with the stage there is nothing to say."""
    changes = {"student.noise": "8"}
    object.__setattr__(run, "config", with_overrides(run.config, changes))
    _, warnings = forecast(run, lambda text: None, PLENTY)
    (warning,) = warnings
    assert warning.startswith("student.noise=8 without a stage three")
    changes = {"stage_three.epochs": "1"}
    object.__setattr__(run, "config", with_overrides(run.config, changes))
    assert forecast(run, lambda text: None, PLENTY)[1] == []


def test_what_does_not_fit_is_warned_of_with_what_to_change(run):
    """Memory, disk and days, each with the settings that would help."""
    _, warnings = forecast(run, lambda text: None, Limits(memory_gib=3.0, disk_gib=10.0))
    assert any("stage_two needs 4.0 GiB" in text and "accumulate" in text for text in warnings)
    assert any("18.0 GiB, the store's disk has 10.0 free" in text for text in warnings)
    (search,) = [text for text in warnings if text.startswith("search needs 8.0 GiB")]
    (teacher,) = [text for text in warnings if text.startswith("teacher needs 4.0 GiB")]
    for text in (search, teacher):  # nothing is advised that no config has
        for key in re.findall(r"(?:search|stage_two|teacher|data)\.\w+", text):
            with_overrides(run.config, {key: "32"})
    long = dataclasses.replace(run.config.stage_two, epochs=10**5)
    object.__setattr__(run, "config", dataclasses.replace(run.config, stage_two=long))
    _, warnings = forecast(run, lambda text: None, PLENTY)
    assert any("stage_two would take 21 days" in text for text in warnings)
    searched = dataclasses.replace(run.config.search, images=4 * 10**8)
    object.__setattr__(run, "config", dataclasses.replace(run.config, search=searched))
    _, warnings = forecast(run, lambda text: None, PLENTY)
    assert any("search would take 46 days: lower search.trials" in text for text in warnings)


def test_a_killed_measurement_is_a_warning(run, monkeypatch):
    """Where the measuring process dies, the others are forecast and that one is warned of."""
    monkeypatch.setattr(forecasting, "_measured", lambda *_: None)
    found, warnings = forecast(run, lambda text: None, PLENTY)
    assert found == []
    assert len(warnings) == 4
    assert "teacher.batch" in warnings[0]
    for text in warnings:  # nothing is advised that no config has
        for key in re.findall(r"(?:teacher|captions|stage_one|stage_two|data)\.\w+", text):
            with_overrides(run.config, {key: "32"})


@pytest.mark.timeout(240)
def test_the_command_measures_and_leaves_nothing(tmp_path, monkeypatch):
    """`sdn run tiny --dry-run --json`: the config, a forecast of each stage, measured; no file."""
    monkeypatch.setenv("SDN_CPUS", "2")
    monkeypatch.setattr(forecasting, "_SECONDS", 2.0)
    monkeypatch.setattr(forecasting.forecast, "__defaults__", (None, 2.0))
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    place = tmp_path / "store"
    command = ["run", "tiny", "--dry-run", "--json", "--store", str(place)]
    done = CliRunner().invoke(app, [*command, "--set", "stage_two.epochs=7"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["config"]["name"] == "tiny"
    assert answer["config"]["stage_two"]["epochs"] == 7
    assert [one["stage"] for one in answer["forecast"]][-1] == "stage_two"
    assert all(one["images_per_s"] > 0 and one["hours"] is None for one in answer["forecast"])
    assert answer["warnings"] == []
    assert not place.exists()
    assert list(here.iterdir()) == []


def test_memory_is_that_of_all_gpus(monkeypatch, tmp_path):
    """A forecast adds up its workers, each of which has a GPU: so does the limit."""
    card = SimpleNamespace(total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(forecasting, "_measured", lambda *given: None)
    monkeypatch.setattr(
        forecasting, "_warnings", lambda found, limits, config: [f"{limits.memory_gib} GiB"]
    )
    _, warnings = forecast(RunSpec("tiny", store=str(tmp_path)).open(), lambda text: None)
    assert warnings[-1] == "24.0 GiB"

"""What the flow hands from stage to stage, and what decides whether a stage is done."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow.exceptions import MlflowException

from pipelines.flows import pipeline as module
from pipelines.flows.stages import Tracked, do
from pipelines.run import Done, Job, RunSpec
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from pipelines.work import check_splits, possible_workers
from sdn.config import DataConfig, LossWeights, to_dict
from sdn.data.files import LocalFolder
from sdn.data.sources.fingerprint import fingerprint
from sdn.recipes import recipe


def done(name, result):
    return Done(name=name, key=f"key of {name}", folder=name, result=result, seconds=1, fresh=True)


def test_stage_two_gets_the_weights_that_the_search_chose(monkeypatch, tmp_path):
    """Stage two's key, and so its training, is that of the search's weights, not the recipe's."""
    found = LossWeights(image=7, conv1=6, conv2=5, conv3=4, conv4=3, conv5=2)
    asked = {}

    def instead(run, job, tracked=None):
        asked[job.stage.name] = job.stage
        result = {
            "manifest": "m", "samples": {"train": 9, "validation": 9, "test": 9}, "sha256": "t",
            "weights": to_dict(found), "place": "nowhere",
        }  # fmt: skip
        return done(job.stage.name, result)

    class Tracked:
        def __init__(self, *args):
            pass

        finished = __init__

        def failing(self):
            return pytest.MonkeyPatch().context()

    class Store:
        uri = "nowhere"

        def fetch(self, _folder):
            return tmp_path

        def files(self, _folder):
            return LocalFolder(tmp_path)

    monkeypatch.setattr(module, "do", instead)
    monkeypatch.setattr(module, "Tracked", Tracked)
    for name in ("parent_key", "register", "show_data", "describe", "show_result", "summary"):
        monkeypatch.setattr(module, name, lambda *args: None)
    run = RunSpec("tiny", store=str(tmp_path)).open()
    object.__setattr__(run, "store", Store())
    module.chain(run)
    assert asked["stage_two"].config["stage"]["weights"] == to_dict(found)
    assert asked["stage_one"].config["stage"]["weights"] == to_dict(run.config.stage_one.weights)
    assert asked["stage_two"].inputs["start"] == "key of stage_one"


def test_one_parent_run_though_mlflow_fails_at_it(monkeypatch, tmp_path):
    """MLflow fails at the first writing: the same run has config and data at the end."""
    run = RunSpec("tiny", store=str(tmp_path)).open()
    data = done("prepare", {"manifest": "m"})
    monkeypatch.setattr(module, "data_tables", lambda *_: ([{"what": "samples", "count": 9}], []))
    tracked = Tracked(Tracker(run.settings, "tiny"), "tiny", module.parent_key(run, data))
    client = tracked.tracker.client

    def fails(*_args, **_kwargs):
        raise MlflowException("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(client, "log_batch", fails)
        module.describe(run, tracked, data)
    assert not tracked.described
    again = Tracked(tracked.tracker, "tiny", module.parent_key(run, data))
    for same in (tracked, again):
        module.describe(run, same, data)
        assert same.described
    (parent,) = client.search_runs([tracked.tracker.experiment])
    assert parent.info.run_id == tracked.parent == again.parent
    assert parent.data.tags["sdn.manifest"] == "m"
    assert parent.data.params["name"] == "tiny"
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert names == {"config.json", "data.json"}


def test_threads_that_look_for_a_run_at_once_make_one(tmp_path):
    """The mirroring thread and the flow ask for the same run."""
    tracker = Tracker(RunSpec("tiny", store=str(tmp_path)).open().settings, "tiny")
    assert tracker.experiment
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: tracker.run("some", "key"), range(8)))) == 1


@pytest.mark.timeout(180)
def test_one_store_knows_nothing_of_anothers_results(tmp_path):
    """The same key in two stores is done in each, and each keeps its own result."""
    from prefect import flow
    from prefect.testing.utilities import prefect_test_harness

    stage = Stage(name="some", config={"n": 1})
    calls = []

    @flow
    def both():
        found = []
        for store in ("a", "b", "a", "b"):
            run = RunSpec("tiny", store=str(tmp_path / store)).open()

            def work(folder, store=store):
                calls.append(store)
                return {"made in": store}

            found.append(do(run, Job(stage=stage, work=work)))
        return found

    with prefect_test_harness(server_startup_timeout=90):
        found = both()
    assert [one.result["made in"] for one in found] == ["a", "b", "a", "b"]
    assert [one.fresh for one in found] == [True, True, False, False]
    assert calls == ["a", "b"]


@pytest.mark.parametrize(
    ("samples", "trials", "words"),
    [
        ({"train": 5, "validation": 2}, 0, "data.test_share"),
        ({"train": 5, "validation": 2, "test": 5}, 0, "fewer than 6: raise data.test_share"),
        ({"train": 5, "test": 6}, 4, "data.validation_share"),
        ({"train": 5, "test": 6}, 1, None),
        ({"train": 5, "validation": 1, "test": 6}, 4, None),
    ],
)
def test_splits_are_checked_before_training(samples, trials, words):
    """What a later stage would fail on is refused with the setting that mends it."""
    config = recipe("tiny")
    config = dataclasses.replace(config, search=dataclasses.replace(config.search, trials=trials))
    data = done("prepare", {"samples": samples})
    if words is None:
        check_splits(config, data)
        return
    with pytest.raises(ValueError, match=words):
        check_splits(config, data)


@pytest.mark.parametrize(("cpus", "expected"), [(1, 1), (2, 2), (16, 2)])
def test_workers_fit_the_machine(cpus, expected, monkeypatch):
    """At most one worker a core, and never more than the recipe has."""
    monkeypatch.setenv("SDN_CPUS", str(cpus))
    run = RunSpec("tiny").open()
    assert possible_workers(run.config, 16, run) == (expected, expected)


def test_a_source_changes_its_fingerprint_with_its_files(tmp_path):
    """Another file, or another size, is another source; without a path there is none."""
    config, files = DataConfig(source="folder"), LocalFolder(tmp_path)
    with pytest.raises(ValueError, match=r"no folder .* or no file in it"):
        fingerprint(config, files)
    (tmp_path / "a.txt").write_text("a bird")
    before = fingerprint(config, files)
    (tmp_path / "b.txt").write_text("a bird")
    after = fingerprint(config, files)
    assert before != after == fingerprint(config, files)
    (tmp_path / "b.txt").write_text("two birds")
    assert fingerprint(config, files) != after
    with pytest.raises(ValueError, match=r"data\.path is not set"):
        fingerprint(config, None)
    assert "resvg-py" in fingerprint(DataConfig(source="openmoji"), None)

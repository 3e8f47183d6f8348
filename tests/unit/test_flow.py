"""What the flow hands from stage to stage, and what decides whether a stage is done."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow.exceptions import MlflowException

from pipelines.flows import chain as module
from pipelines.flows.stages import Tracked, do
from pipelines.run import Done, Job, RunSpec
from pipelines.search_pictures import PICTURES
from pipelines.searching import weights_content
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from pipelines.weights_from import WEIGHTS
from pipelines.work import check_splits, possible_workers
from sdn.choosing import Choice
from sdn.config import DataConfig, to_dict, with_overrides
from sdn.data.files import LocalFolder
from sdn.data.sources.fingerprint import fingerprint
from sdn.recipes import recipe
from sdn.space import own_values, with_values


def done(name, result):
    return Done(name=name, key=f"key of {name}", folder=name, result=result, seconds=1, fresh=True)


FOUND = {"conv1": 6.0, "image": 70.0}
"""Values that a search chose."""
NOTHING = {"values": {}, "trials": [], "chosen": None, "reason": "nothing was searched"}


class Store:
    uri = "nowhere"

    def __init__(self, folder):
        self.folder = folder

    def fetch(self, _folder):
        return self.folder

    def files(self, _folder):
        return LocalFolder(self.folder)


@pytest.fixture
def stages_of(monkeypatch, tmp_path):
    """Run the chain of a run without its work: stages in order, and what the search is to find."""

    def chain(run, values):
        asked = {}

        def instead(run, job, tracked=None):
            asked[job.stage.name] = job
            result = {
                "manifest": "m", "samples": {"train": 9, "validation": 9, "test": 9},
                "sha256": "t", "place": "nowhere",
            }  # fmt: skip
            if job.stage.name == "search" and values is None:
                result = job.work(tmp_path)  # nothing is searched
            elif job.stage.name == "search":
                result = NOTHING | {"values": values}
            return done(job.stage.name, result)

        class Tracked:
            def __init__(self, *args):
                pass

            finished = __init__

            def failing(self):
                return pytest.MonkeyPatch().context()

        monkeypatch.setattr(module, "do", instead)
        monkeypatch.setattr(module, "Tracked", Tracked)
        for name in (
            *("parent_key", "register", "show_data", "describe", "show_result", "summary"),
            "tell",
        ):
            monkeypatch.setattr(module, name, lambda *args: None)
        object.__setattr__(run, "store", Store(tmp_path))
        module.chain(run)
        return {name: job.stage for name, job in asked.items()}

    return chain


def test_stage_two_gets_the_values_that_the_search_chose(stages_of, tmp_path):
    """Stage two's key, and so its training, is that of the search's values, not the recipe's."""
    run = RunSpec("tiny", {"search.trials": "4"}, store=str(tmp_path)).open()
    stages = stages_of(run, FOUND)
    expected = with_values(run.config, FOUND)
    assert expected != run.config
    assert stages["stage_two"].config["stage"] == to_dict(expected.stage_two)
    assert stages["stage_one"].config["stage"] == to_dict(run.config.stage_one)
    assert stages["stage_two"].inputs["start"] == "key of stage_one"
    names = list(stages)
    assert names.index("stage_one") < names.index("search") < names.index("stage_two")
    assert stages["search"].inputs["start"] == "key of stage_one"
    assert stages["search"].inputs["reference"] == "key of reference"


def test_the_recipes_own_values_stay(stages_of, tmp_path):
    """Where the search has found nothing better stage two is that of the recipe alone."""
    run = RunSpec("tiny", {"search.trials": "4"}, store=str(tmp_path)).open()
    stages = stages_of(run, {})
    alone = stages_of(RunSpec("tiny", {"search.trials": "0"}, str(tmp_path)).open(), None)
    assert stages["stage_two"] == alone["stage_two"]
    assert stages["stage_two"].config["stage"] == to_dict(run.config.stage_two)
    assert stages["search"].key != alone["search"].key


def test_a_search_of_both_stages_comes_before_both(stages_of, tmp_path):
    """Stage one has the values that were found for it, and does not start the search."""
    space = json.dumps({"share": {}, "stage_one.conv3": {}, "conv1": {}})
    changes = {"search.trials": "4", "search.stage_one": "true", "search.space": space}
    run = RunSpec("tiny", changes, str(tmp_path)).open()
    values = {"share": 0.25, "stage_one.conv3": 5.0, "conv1": 6.0}
    stages = stages_of(run, values)
    expected = with_values(run.config, values)
    assert stages["stage_one"].config["stage"] == to_dict(expected.stage_one)
    assert stages["stage_two"].config["stage"] == to_dict(expected.stage_two)
    names = list(stages)
    assert names.index("search") < names.index("stage_one") < names.index("stage_two")
    assert "start" not in stages["search"].inputs
    assert stages["stage_two"].inputs["start"] == "key of stage_one"


def test_weights_from_an_earlier_search_are_not_searched_again(stages_of, tmp_path):
    """Stage two is the one that the search led to, and the search has nothing to do."""
    run = RunSpec("tiny", {"search.trials": "4"}, str(tmp_path)).open()
    first = stages_of(run, FOUND)
    data = done("prepare", {"manifest": "m"})
    content = weights_content(run.config, FOUND, {"data": data}, Choice(number=2, reason="better"))
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps(content))
    again = RunSpec("tiny", {}, str(tmp_path), str(weights)).open()
    assert again.config.search.trials == 0
    stages = stages_of(again, None)  # the work of its search is done for true: there is none
    assert stages["stage_two"] == first["stage_two"]
    assert stages["stage_one"] == first["stage_one"]


def search_result(**more):
    """A finished search of three trials."""

    def point(images):
        return {"images_seen": images, "value": 0.5, "low": 0.4, "high": 0.6, "seconds": 1.5}

    trials = [
        {"number": 0, "state": "finished", "values": {"conv1": 1.0}, "reason": None,
         "points": [point(36), point(320)], "value": 0.5, "seconds": 3.0},
        {"number": 1, "state": "finished", "values": {"conv1": 2.0}, "reason": None,
         "points": [point(36), point(320)], "value": 0.5, "seconds": 3.0, "p_value": 0.25},
        {"number": 2, "state": "stopped", "values": {"conv1": 3.0}, "points": [point(36)],
         "reason": "behind the others", "value": 0.5, "seconds": 1.5},
        {"number": 3, "state": "failed", "values": {"conv1": 4.0}, "points": [],
         "reason": "LossNotFiniteError: step 3", "value": None, "seconds": 0},
    ]  # fmt: skip
    correlation = {"trials": 1, "withheld": "too few"}
    return {
        "trials": trials, "values": {}, "own": own_values(recipe("tiny")), "chosen": 0,
        "reason": "nothing better", "score": "KID", "rank_correlation": correlation,
    } | more  # fmt: skip


def trial_runs(tracker):
    """Name -> the run of MLflow of each trial."""
    runs = tracker.client.search_runs([tracker.experiment])
    found = [run for run in runs if run.data.tags["sdn.name"].startswith("trial ")]
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


@pytest.mark.timeout(180)
def test_each_trial_is_a_nested_run(tmp_path):
    """Values, scores over images seen, p-value and state, once, however often they are said."""
    settings = RunSpec("tiny", store=str(tmp_path)).open().settings
    tracker, folder = Tracker(settings, "tiny"), tmp_path / "stage"
    (folder / PICTURES).mkdir(parents=True)
    (folder / PICTURES / "history.png").write_bytes(b"PNG")
    (folder / WEIGHTS).write_text("{}")
    tracked = Tracked(tracker, "tiny", "parent")
    searched = done("search", search_result())
    parent = tracked._run("search", searched.key)
    for trial in searched.result["trials"]:  # as while the search goes on: nothing is compared yet
        early = {name: value for name, value in trial.items() if name != "p_value"}
        tracked._trial(parent, searched.key, early)
        tracked._trial(parent, searched.key, early)
    for again in (tracked, tracked, Tracked(tracker, "tiny", "parent")):
        again.finished(searched, LocalFolder(tmp_path / "place"), lambda: folder)
    runs = trial_runs(tracker)
    assert set(runs) == {f"trial {n}" for n in range(4)}
    statuses = {name: run.info.status for name, run in runs.items()}
    assert statuses == {
        "trial 0": "FINISHED", "trial 1": "FINISHED", "trial 2": "KILLED", "trial 3": "FAILED",
    }  # fmt: skip
    second, failed = runs["trial 1"], runs["trial 3"]
    assert second.data.tags["mlflow.parentRunId"] == parent
    assert second.data.params == {"conv1": "2.0"}
    assert second.data.metrics["p_value"] == 0.25
    assert failed.data.tags["sdn.reason"] == "LossNotFiniteError: step 3"
    for name, value in (("value", 0.5), ("low", 0.4), ("high", 0.6), ("seconds", 1.5)):
        history = tracker.client.get_metric_history(second.info.run_id, name)
        assert sorted((one.step, one.value) for one in history) == [(36, value), (320, value)]
    names = {file.path for file in tracker.client.list_artifacts(parent)}
    assert names == {"trials.json", "choice.txt", WEIGHTS, PICTURES}
    assert tracker.client.get_run(parent).info.status == "FINISHED"


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
        ({"train": 5, "test": 6}, 4, "no validation images .* needs 6 .*data.validation_share"),
        ({"train": 5, "test": 6}, 4, "with data.validation_from_train=true"),
        ({"train": 5, "validation": 5, "test": 6}, 2, "5 validation images .*search.trials=0"),
        ({"train": 5, "validation": 6, "test": 6}, 2, None),
        ({"train": 5, "validation": 1, "test": 6}, 1, None),
        ({"train": 5, "test": 6}, 1, None),
        ({"train": 5, "test": 6}, 0, None),
    ],
)
def test_splits_are_checked_before_training(samples, trials, words):
    """What a later stage would fail on is refused with the setting that mends it."""
    config = with_overrides(recipe("tiny"), {"search.trials": str(trials)})
    if words is None:
        check_splits(config, samples)
        return
    with pytest.raises(ValueError, match=words):
        check_splits(config, samples)


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

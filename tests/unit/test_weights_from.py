"""Weights that an earlier search has found, wherever they lie."""

from __future__ import annotations

import json

import pytest

from pipelines.run import Done, RunSpec
from pipelines.searching import weights_content
from pipelines.settings import Settings
from pipelines.tracking import Tracker
from pipelines.weights_from import SEARCH_TAG, WEIGHTS, found_changes
from sdn.choosing import Choice
from sdn.config import with_overrides
from sdn.recipes import recipe
from sdn.space import with_values

pytestmark = pytest.mark.timeout(300)
STAGE = "search-0123456789abcdef"
VALUES = {"conv1": 3.5, "conv3_1": 0.25, "rate": 5e-4}


def content(config, values=VALUES):
    data = Done(
        name="prepare", key="k", folder="f", result={"manifest": "m"}, seconds=0, fresh=True
    )
    found = weights_content(config, values, {"data": data}, Choice(number=3, reason="better"))
    return json.dumps(found)


TINY = content(recipe("tiny"))


@pytest.fixture
def settings(tmp_path):
    return Settings(store=str(tmp_path / "store"), cache=tmp_path / "cache")


def publish(settings, text, name=STAGE):
    """A finished search of the store, with or without weights."""
    from pipelines.store import LocalStore

    store = LocalStore(settings.local)
    folder = store.workspace(f"stages/{name}")
    if text is not None:
        (folder / WEIGHTS).write_text(text)
    store.publish(f"stages/{name}", {"result": {}})
    return folder


def track(settings, tmp_path, text):
    """Ids of MLflow's runs of a whole pipeline and of its search, which has these weights."""
    tracker = Tracker(settings, "tiny")
    parent = tracker.run("tiny", "key")
    tracker.run("stage_two", "two", parent)
    search = tracker.run("search", "searched", parent)
    tracker.log(parent, tags={SEARCH_TAG: search})
    if text is not None:
        path = tmp_path / WEIGHTS
        path.write_text(text)
        tracker.file(search, path)
    return tracker, parent, search


def check_config(changes):
    """The tiny recipe has the values of the search and searches no more."""
    config = with_overrides(recipe("tiny"), changes)
    assert config.search.trials == 0
    expected = with_values(recipe("tiny"), VALUES)
    assert config.stage_two == expected.stage_two
    assert config.stage_two.weights.conv1 == 3.5
    assert config.stage_two.weights.taps == {"conv3_1": 0.25}
    assert config.stage_two.rate == 5e-4
    assert config.stage_one == recipe("tiny").stage_one


@pytest.mark.parametrize("folder", [False, True])
def test_weights_of_a_file_or_its_folder(tmp_path, settings, folder):
    """A weights.json is taken, and the one in a folder."""
    path = tmp_path / WEIGHTS
    path.write_text(TINY)
    check_config(found_changes(str(tmp_path if folder else path), "tiny", settings))


def test_weights_of_another_recipe_are_taken_with_a_word(tmp_path, settings, caplog):
    """They may be better there too, but nobody has looked; of the same recipe nothing is said."""
    path = tmp_path / WEIGHTS
    path.write_text(TINY)
    changes = found_changes(str(path), "tiny", settings)
    assert caplog.text == ""
    assert found_changes(str(path), "openmoji", settings) == changes
    assert "searched on the recipe tiny, not on openmoji" in caplog.text


def test_weights_of_a_search_of_the_store(settings):
    """The name of a finished search of the store is enough; so is its path."""
    folder = publish(settings, TINY)
    check_config(found_changes(STAGE, "tiny", settings))
    check_config(found_changes(str(folder), "tiny", settings))


def test_the_folder_as_the_terminal_names_it(settings):
    """`stages/search-...` is the same search."""
    publish(settings, TINY)
    assert found_changes(f"stages/{STAGE}", "tiny", settings) == found_changes(
        STAGE, "tiny", settings
    )


def test_another_file_is_no_weights(tmp_path, settings):
    """The error names the file that was given, and what it should hold."""
    path = tmp_path / "done.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"done\.json: expected a weights\.json .*`changes`"):
        found_changes(str(path), "tiny", settings)


def test_weights_of_a_run_of_mlflow(tmp_path, settings):
    """The run of the search is taken, and the run of the whole pipeline leads to it."""
    _, parent, search = track(settings, tmp_path, TINY)
    for run in (search, parent):
        check_config(found_changes(run, "tiny", settings))


def test_mlflow_has_no_such_run_or_search(tmp_path, settings):
    """A run that MLflow does not have, or that has no search or weights, is named."""
    tracker, parent, search = track(settings, tmp_path, None)
    for run in (parent, search, "0" * 32):
        with pytest.raises(ValueError, match=f"--weights-from {run}: MLflow .* no weights.json"):
            found_changes(run, "tiny", settings)
    other = tracker.run("other", "another key")
    with pytest.raises(ValueError, match=f"--weights-from {other}: .* has no search"):
        found_changes(other, "tiny", settings)


@pytest.mark.parametrize("error", [ConnectionError(), ConnectionError("refused"), TimeoutError()])
def test_mlflow_does_not_answer(monkeypatch, settings, error):
    """An error of its server, without any text too, is one about the option."""

    class Gone:
        def get_run(self, _run):
            raise error

    monkeypatch.setattr("pipelines.tracking.client", lambda settings: Gone())
    with pytest.raises(ValueError, match=f"--weights-from {'a' * 32}: MLflow at .*mlflow.db"):
        found_changes("a" * 32, "tiny", settings)


@pytest.mark.parametrize(
    "where", ["nothing", "search-0123", "a" * 31, "stage_two-0123456789abcdef", "./weights.json"]
)
def test_a_name_that_is_nothing(tmp_path, monkeypatch, settings, where):
    """The error says what came and what could have been given."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected the id of an MLflow run, a search") as caught:
        found_changes(where, "tiny", settings)
    assert where in str(caught.value)
    assert "search-0123456789abcdef" in str(caught.value)
    assert WEIGHTS in str(caught.value)


def test_a_folder_without_weights(tmp_path, settings):
    """A folder that has none is refused as a name that is nothing."""
    with pytest.raises(ValueError, match="expected the id of an MLflow run"):
        found_changes(str(tmp_path), "tiny", settings)


def test_a_search_that_is_not_finished(settings):
    """A search that the store does not have, or has begun only, is not read."""
    with pytest.raises(ValueError, match=r"store has no such finished search"):
        found_changes(STAGE, "tiny", settings)
    folder = publish(settings, TINY)
    (folder / "done.json").unlink()
    with pytest.raises(ValueError, match=r"store has no such finished search"):
        found_changes(STAGE, "tiny", settings)


def test_a_search_that_compared_nothing(settings):
    """A search of fewer than two trials has no weights to give."""
    publish(settings, None)
    with pytest.raises(ValueError, match=f"--weights-from {STAGE}: that search had nothing"):
        found_changes(STAGE, "tiny", settings)


@pytest.mark.parametrize(
    "text",
    ["", TINY[:50], "[]", "{}", '{"changes": 3}', '{"changes": null}', '{"changes": "text"}', "\0"],
)
@pytest.mark.parametrize("place", ["file", "store"])
def test_damaged_weights(tmp_path, settings, text, place):
    """A file that is cut or of another kind is refused with its name."""
    path = tmp_path / WEIGHTS
    path.write_text(text)
    where = STAGE if place == "store" else str(path)
    if place == "store":
        publish(settings, text)
    told = f"--weights-from .*: expected a {WEIGHTS} .* is damaged"
    with pytest.raises(ValueError, match=told) as caught:
        found_changes(where, "tiny", settings)
    assert where in str(caught.value)


def open_run(tmp_path, changes, text=TINY, name="tiny"):
    path = tmp_path / WEIGHTS
    path.write_text(text)
    return RunSpec(name, changes, str(tmp_path / "store"), str(path)).open()


def test_what_is_set_by_hand_wins(tmp_path):
    """An explicit change wins over what was found, and leaves the rest of it."""
    changes = {"stage_two.weights.conv1": "7", "stage_two.epochs": "2", "search.seed": "5"}
    config = open_run(tmp_path, changes).config
    assert config.stage_two.weights.conv1 == 7
    assert config.stage_two.weights.taps == {"conv3_1": 0.25}
    assert (config.stage_two.rate, config.stage_two.epochs) == (5e-4, 2)
    assert (config.search.trials, config.search.seed) == (0, 5)
    again = open_run(tmp_path, {"search.trials": "3", "stage_two.rate": "0.001"}).config
    assert (again.search.trials, again.stage_two.rate) == (3, 0.001)
    assert again.stage_two.weights.conv1 == 3.5


def test_a_run_without_them_is_as_the_recipe_says(tmp_path):
    """Nothing is taken where nothing was asked for."""
    for nothing in (None, ""):
        run = RunSpec("tiny", {}, str(tmp_path), nothing).open()
        assert run.config == recipe("tiny")


def test_weights_for_another_recipe(tmp_path):
    """Another recipe takes the values as they are, and keeps all else of its own."""
    config = open_run(tmp_path, {}, name="openmoji").config
    own, tiny = recipe("openmoji"), with_values(recipe("tiny"), VALUES)
    assert config.stage_two.weights == tiny.stage_two.weights
    assert config.stage_two.rate == 5e-4
    assert config.stage_two.epochs == own.stage_two.epochs
    assert (config.teacher, config.stage_one) == (own.teacher, own.stage_one)


def test_weights_of_both_stages(tmp_path):
    """A search of both stages gives weights, rates and lengths of both."""
    space = {"share": {}, "stage_one.conv3": {}, "stage_one.rate": {}, "conv1": {}}
    changes = {"search.stage_one": "true", "search.space": json.dumps(space)}
    searched = with_overrides(recipe("tiny"), changes)
    values = {"share": 0.25, "stage_one.conv3": 6.0, "stage_one.rate": 2e-3, "conv1": 4.0}
    config = open_run(tmp_path, {}, content(searched, values)).config
    expected = with_values(searched, values)
    assert (config.stage_one, config.stage_two) == (expected.stage_one, expected.stage_two)
    assert config.stage_one.epochs == 0.25 * 15
    assert config.stage_one.weights.conv3 == 6


def test_the_recipes_own_values(tmp_path):
    """Where the recipe's own values stayed, they are what is taken."""
    config = open_run(tmp_path, {}, content(recipe("tiny"), {})).config
    assert config.stage_two == recipe("tiny").stage_two
    assert config.search.trials == 0

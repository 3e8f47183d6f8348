"""What a filled-in form means, and what it refuses."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from pipelines.flows import opening
from pipelines.flows.form import AS_RECIPE, KEYS, Protocol, RecipeName, SourceName, changes_of
from pipelines.flows.opening import open_run
from sdn.config import EvaluationConfig, to_dict, with_overrides
from sdn.data.sources import SOURCES
from sdn.recipes import RECIPES, recipe


def test_the_lists_to_choose_from_are_whole():
    """Every recipe, source and protocol that there is can be chosen, and no other."""
    assert set(typing.get_args(RecipeName)) == set(RECIPES)
    assert set(typing.get_args(SourceName)) == {AS_RECIPE, *SOURCES}
    known = typing.get_args(typing.get_type_hints(EvaluationConfig)["protocol"])
    assert set(typing.get_args(Protocol)) == {AS_RECIPE, *known}


def test_every_field_sets_keys_that_there_are():
    """Each key of each field is one of the config."""
    for keys in KEYS.values():
        for key in keys:
            group, _, last = key.rpartition(".")
            config = recipe("tiny")
            held = getattr(config, group) if group else config
            assert last in {field.name for field in dataclasses.fields(held)}, key


def test_a_form_left_as_it_is_changes_nothing():
    """0, an empty field and "as the recipe says" leave the recipe alone."""
    empty = dict.fromkeys(KEYS, 0) | {"data_path": "", "source": AS_RECIPE, "learning_rate": 0.0}
    assert changes_of(empty, []) == {}


def test_fields_and_changes_reach_the_config():
    """A field sets its keys, the changes any other."""
    fields = {"resolution": 96, "learning_rate": 2e-4, "protocol": "gan", "stage_two_epochs": 2.5}
    config = with_overrides(recipe("openmoji"), changes_of(fields, ["stage_two.clip=1"]))
    assert config.data.resolution == 96
    assert config.stage_one.rate == config.stage_two.rate == 2e-4
    assert config.evaluation.protocol == "gan"
    assert config.stage_two.epochs == 2.5
    assert config.stage_two.clip == 1


def test_the_recipes_own_values_typed_in_are_the_same_run():
    """Whoever types what the recipe has anyway gets the same config: nothing is done twice."""
    own = recipe("tiny")
    fields = {"resolution": 32, "stage_two_epochs": 12.0, "search_trials": 2, "workers": 2}
    assert to_dict(with_overrides(own, changes_of(fields, []))) == to_dict(with_overrides(own, {}))


def test_a_field_and_a_change_may_not_contradict():
    """Said twice with two values, neither is taken."""
    with pytest.raises(ValueError, match=r"stage_two_epochs is 3.*stage_two\.epochs is 4"):
        changes_of({"stage_two_epochs": 3}, ["stage_two.epochs=4"])
    assert changes_of({"stage_two_epochs": 3}, ["stage_two.epochs=3"]) == {"stage_two.epochs": "3"}


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("tiny", {"data_path": "photos"}, "openmoji carries its own images.*photos"),
        ("folder", {}, "folder needs the place of your images: --set data.path"),
        ("tiny", {"workers": 5}, r"workers must divide lanes \(48\), 5 does not; possible"),
        ("tiny", {"workers": 24}, "workers .24. must be at most stage_one.global_batch"),
        ("tiny", {"weights_from": "search-0", "search_trials": 8}, "leave one of them out"),
    ],
)
def test_a_combination_that_cannot_work_is_shown_and_refused(
    name, fields, words, monkeypatch, tmp_path
):
    """Nothing is begun; what was asked for and why it cannot be is the first artifact."""
    shown = []
    monkeypatch.setattr(opening, "show_refusal", lambda asked, why: shown.append((asked, why)))
    monkeypatch.setattr(opening, "show_config", lambda run: pytest.fail("a config was shown"))
    with pytest.raises(ValueError, match=words) as refused:
        open_run(name, str(tmp_path / "store"), [], **fields)
    ((asked, why),) = shown
    assert why == str(refused.value)
    assert asked["recipe"] == name
    assert fields.items() <= asked.items()
    assert not (tmp_path / "store").exists()


def test_the_resolved_config_is_shown_first(monkeypatch, tmp_path):
    """Before the store is touched."""
    shown = []
    monkeypatch.setattr(opening, "show_config", lambda run: shown.append(run.store.root.exists()))
    run = open_run("tiny", str(tmp_path / "store"), ["stage_two.epochs=2"], seed=3)
    assert shown == [False]
    assert (run.config.stage_one.seed, run.config.stage_two.seed) == (3, 3)
    assert run.config.stage_two.epochs == 2
    assert run.store.root == tmp_path / "store"

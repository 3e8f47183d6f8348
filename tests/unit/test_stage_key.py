import dataclasses

import pytest

from pipelines import stage as stages
from pipelines.stage import Stage

BASE = Stage(
    name="teacher",
    config={"width": 0.5, "nested": {"a": 1, "b": [1, 2]}},
    inputs={"data": "d1", "captions": "c1"},
)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "captions"},
        {"config": {"width": 0.25, "nested": {"a": 1, "b": [1, 2]}}},
        {"config": {"width": 0.5, "nested": {"a": 2, "b": [1, 2]}}},
        {"config": {"width": 0.5, "nested": {"a": 1, "b": [2, 1]}}},
        {"config": {"width": 0.5}},
        {"config": None},
        {"inputs": {"data": "d2", "captions": "c1"}},
        {"inputs": {"data": "c1", "captions": "d1"}},
        {"inputs": {"data": "d1"}},
        {"inputs": {}},
    ],
)
def test_key_changes_with_every_part(changes):
    """Another name, config or input, at any depth, gives another key and another folder."""
    other = dataclasses.replace(BASE, **changes)
    assert other.key != BASE.key
    assert other.folder != BASE.folder


def test_key_changes_with_the_method(monkeypatch):
    """A new version of the method makes all results old."""
    before = BASE.key
    monkeypatch.setattr(stages, "METHOD_VERSION", "another")
    assert BASE.key != before


def test_key_does_not_change_with_order():
    """The order of keys says nothing."""
    other = Stage(
        name="teacher",
        config={"nested": {"b": [1, 2], "a": 1}, "width": 0.5},
        inputs={"captions": "c1", "data": "d1"},
    )
    assert other.key == BASE.key
    assert other.folder == BASE.folder


def test_folder_begins_with_the_name():
    """The folder carries the stage's name and the beginning of its key."""
    assert len(BASE.key) == 64
    assert BASE.short == f"teacher-{BASE.key[:16]}"
    assert BASE.folder == f"stages/{BASE.short}"

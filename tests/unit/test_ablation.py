"""The arms of the ablation: what cannot work is known before hours of training."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from sdn.checking import check_config
from sdn.config import with_overrides
from sdn.recipes import recipe

ABLATION = Path(__file__).parents[1] / "benchmarks" / "ablation.py"


@pytest.mark.parametrize("name", ["openmoji", "openmoji-long", "fashion64", "tiny"])
def test_each_arm_is_a_config_that_can_work_and_trains_as_many_images(name):
    """Of every recipe that the documents show arms of; an arm is another config than the recipe."""
    arms = runpy.run_path(str(ABLATION))["arms"]
    config = recipe(name)
    whole = config.stage_one.epochs + config.stage_two.epochs + config.stage_three.epochs
    found = {arm: with_overrides(config, changes) for arm, changes in arms(config).items()}
    assert len(found) > 15
    for arm, changed in found.items():
        check_config(changed)
        stages = (changed.stage_one, changed.stage_two, changed.stage_three)
        assert sum(stage.epochs for stage in stages) == pytest.approx(whole), arm
        assert (changed == config) == (arm == "full"), arm


def test_teachers_without_weights_are_fed_as_by_default():
    """What a file of weights needs says nothing of weights that are drawn or fitted."""
    arms = runpy.run_path(str(ABLATION))["arms"]
    config = with_overrides(recipe("fashion64"), {"teacher.convention": "mean-255"})
    for arm in ("random teacher", "fitted teacher"):
        teacher = with_overrides(config, arms(config)[arm]).teacher
        assert (teacher.weights, teacher.convention) == (None, "imagenet")

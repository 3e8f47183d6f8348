"""What a search varies: names of values, their ranges, and a config with other values.

Departs from the paper, where every loss weight is 1: raw activations differ in scale from tap to
tap and from teacher to teacher.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sdn.config import TAP_GROUPS, LossWeights, Range
from sdn.taps import blocks_of, taps_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdn.config import RunConfig, SearchConfig, StageConfig

STAGE_ONE, SHARE, RATE = "stage_one.", "share", "rate"
_LONGEST_SHARE = 0.95


def check_space(config: RunConfig) -> None:
    """Refuse a search that cannot work.

    Raises:
        ValueError: a tap that the teacher does not have, more ranks than lanes or batch allow, or
            nothing to vary.
    """
    search = config.search
    taps = [tap.name for tap in taps_of(blocks_of(config.teacher.arch, config.teacher.width))]
    for name in search.space:
        if name.removeprefix(STAGE_ONE) not in {*TAP_GROUPS, RATE, SHARE, *taps}:
            raise ValueError(
                f"search.space.{name}: {config.teacher.arch} has no such tap; it has "
                f"{', '.join(taps)}"
            )
    batch = config.stage_two.global_batch
    if search.stage_one:
        batch = min(batch, config.stage_one.global_batch)
    if config.lanes % search.workers or search.workers > batch:
        raise ValueError(
            f"search.workers must divide lanes ({config.lanes}) and be at most the stages' "
            f"global_batch ({batch}), not {search.workers}"
        )
    if search.stage_one and not 0 < own_share(config) < 1:
        raise ValueError(
            "search.stage_one needs both stages: stage_one.epochs and stage_two.epochs must be > 0"
        )
    if not search.space and not search.stage_one:
        raise ValueError(
            "search.space leaves nothing to vary: it is empty; name groups, taps or rate, such as "
            'search.space={"image": {}, "rate": {}}, or search nothing with search.trials=0'
        )
    if not space_of(config):
        raise ValueError(
            "search.space leaves nothing to vary: each of its names has the value 0 or the range "
            "1 to 1; name others, or search nothing with search.trials=0"
        )


def _asked(search: SearchConfig) -> dict[str, Range]:
    """What is varied: where stage one is and nothing of it is named, all its groups and share."""
    if not search.stage_one or any(n == SHARE or n.startswith(STAGE_ONE) for n in search.space):
        return search.space
    added = [*(STAGE_ONE + group for group in TAP_GROUPS), SHARE]
    return search.space | dict.fromkeys(added, Range())


def own_share(config: RunConfig) -> float:
    """Stage one's share of the images of both stages, 0..1."""
    total = config.stage_one.epochs + config.stage_two.epochs
    return config.stage_one.epochs / total if total else 0.0


def own_values(config: RunConfig) -> dict[str, float]:
    """The recipe's own value of everything that is varied."""
    return {name: _own(config, name) for name in space_of(config)}


def space_of(config: RunConfig) -> dict[str, tuple[float, float]]:
    """Name -> smallest and largest value; what has no room to vary is left out."""
    found = {}
    for name, factors in sorted(_asked(config.search).items()):
        own = _own(config, name)
        low, high = own * factors.low, own * factors.high
        if name == SHARE:
            high = min(high, _LONGEST_SHARE)
        elif name.endswith(RATE):
            high = min(high, 0.999)
        if 0 < low < high:
            found[name] = (low, high)
    return found


def with_values(config: RunConfig, values: Mapping[str, float]) -> RunConfig:
    """The same config with other values of what is varied.

    Args:
        config: of the run.
        values: name -> value; a name that is left out keeps its value.
    """
    one = {n.removeprefix(STAGE_ONE): v for n, v in values.items() if n.startswith(STAGE_ONE)}
    two = {n: v for n, v in values.items() if not n.startswith(STAGE_ONE) and n != SHARE}
    stages = {
        "stage_one": _changed(config.stage_one, one),
        "stage_two": _changed(config.stage_two, two),
    }
    if SHARE in values:
        total = config.stage_one.epochs + config.stage_two.epochs
        first = total * values[SHARE]
        stages["stage_one"] = dataclasses.replace(stages["stage_one"], epochs=first)
        stages["stage_two"] = dataclasses.replace(stages["stage_two"], epochs=total - first)
    changed: dict[str, Any] = stages
    return dataclasses.replace(config, **changed)


def _changed(stage: StageConfig, values: Mapping[str, float]) -> StageConfig:
    groups = {name: value for name, value in values.items() if name in TAP_GROUPS}
    taps = {n: v for n, v in values.items() if n not in TAP_GROUPS and n != RATE}
    weights: LossWeights = dataclasses.replace(
        stage.weights, **groups, taps=stage.weights.taps | taps
    )
    return dataclasses.replace(stage, weights=weights, rate=values.get(RATE, stage.rate))


def _own(config: RunConfig, name: str) -> float:
    if name == SHARE:
        return own_share(config)
    stage = config.stage_one if name.startswith(STAGE_ONE) else config.stage_two
    name = name.removeprefix(STAGE_ONE)
    if name == RATE:
        return stage.rate
    return getattr(stage.weights, name) if name in TAP_GROUPS else stage.weights.of(name)

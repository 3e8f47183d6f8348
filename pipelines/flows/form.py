"""What the forms of the deployments ask: types of their fields, and the changes that they mean.

Prefect's page draws a plain field for a number and a list to choose from for a `Literal`. It would
draw an optional number as two tabs, and say of one out of range no more than that it is "not valid
under any of the given schemas"; so 0 stands for the recipe's own value.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipelines.run import parse_overrides

if TYPE_CHECKING:
    from collections.abc import Mapping

AS_RECIPE: Literal["as the recipe says"] = "as the recipe says"

RecipeName = Literal[
    "openmoji",
    "openmoji-long",
    "tiny",
    "folder",
    "cub",
    "release-cub",
    "flowers",
    "cub64",
    "flowers64",
    "fashion64",
]
SourceName = Literal[
    "as the recipe says",
    "coco",
    "cub",
    "flowers",
    "folder",
    "openmoji",
    "parquet",
    "shards",
    "tars",
]
Protocol = Literal["as the recipe says", "each-image", "authors", "gan"]
Resolution = Annotated[int, Field(ge=0, le=1024, multiple_of=32)]
Epochs = Annotated[float, Field(ge=0, le=100_000)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Trials = Annotated[int, Field(ge=0, le=10_000)]
AtLeastTwo = Annotated[int, Field(ge=2, le=10_000)]
Minutes = Annotated[float, Field(ge=0, le=100_000)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Workers = Literal[0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
"""0, and what divides the 48 lanes of every recipe."""
Version = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""MLflow keeps it in 32 bits."""

KEYS: dict[str, tuple[str, ...]] = {
    "source": ("data.source",),
    "data_path": ("data.path",),
    "resolution": ("data.resolution",),
    "stage_one_epochs": ("stage_one.epochs",),
    "stage_two_epochs": ("stage_two.epochs",),
    "learning_rate": ("stage_one.rate", "stage_two.rate"),
    "search_trials": ("search.trials",),
    "search_minutes": ("search.minutes",),
    "protocol": ("evaluation.protocol",),
    "seed": ("stage_one.seed", "stage_two.seed", "stage_three.seed"),
    "workers": ("workers",),
}
"""Field of a form -> the keys of the config that it sets."""


def changes_of(fields: Mapping[str, Any], changes: list[str]) -> dict[str, str]:
    """The changes of a recipe that a filled-in form means.

    Args:
        fields: name -> value, of `KEYS`; 0, "" and `AS_RECIPE` change nothing.
        changes: each key=value, as typed.

    Raises:
        ValueError: a change without `=`, or one that contradicts a field.
    """
    found = parse_overrides(changes)
    for field, value in fields.items():
        if value in {0, "", AS_RECIPE}:
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        for key in KEYS[field]:
            if found.setdefault(key, text) != text:
                raise ValueError(
                    f"{field} is {text}, but among the changes {key} is {found[key]}: leave one "
                    "of them out"
                )
    return found

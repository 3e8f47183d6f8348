"""One run of the pipeline: which recipe, with which changes, in which store."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipelines.cluster import cores
from pipelines.settings import Settings
from pipelines.store import Store, open_store
from pipelines.weights_from import found_changes
from sdn.checking import check_config
from sdn.config import RunConfig, with_overrides
from sdn.recipes import recipe
from sdn.space import check_space

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from pipelines.stage import Stage


STARTING = "starting"
"""What a stage says before it has anything of its own to say."""


def parse_overrides(changes: list[str]) -> dict[str, str]:
    """`["stage_two.epochs=3"]` as a table.

    Raises:
        ValueError: an entry without `=`.
    """
    found = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"expected key=value, not {change!r}; for example stage_two.epochs=3")
        found[key.strip()] = value.strip()
    return found


@dataclass(frozen=True)
class RunSpec:
    """What a person asked for; plain values, so that it can travel to a worker."""

    recipe: str
    overrides: dict[str, str] = field(default_factory=dict)
    store: str | None = None
    """Overrides `Settings.store`."""
    weights_from: str | None = None
    """Where an earlier search has left its weights, see `pipelines.weights_from`."""

    def open(self, progress: Callable[[str, float, str], None] | None = None) -> Run:
        """The run, with its config resolved and its store known.

        Raises:
            ValueError: unknown recipe or key, a config that cannot work, or no weights where they
                were said to be.
            StoreError: the store cannot be used.
        """
        settings = Settings()
        if self.store is not None:
            settings = settings.model_copy(update={"store": self.store})
        changes = self.overrides
        if self.weights_from:
            changes = found_changes(self.weights_from, self.recipe, settings) | changes
        config = with_overrides(recipe(self.recipe), changes)
        check_config(config)
        if config.search.trials > 1:
            check_space(config)
            room = cores(settings)
            if settings.ray_address is None and config.search.workers > room:
                raise ValueError(
                    f"search.workers={config.search.workers}: each rank of a trial needs a core, "
                    f"and there are {room}"
                )
        return Run(
            spec=self,
            config=config,
            settings=settings,
            progress=progress or (lambda stage, share, text: None),
        )


@dataclass(frozen=True)
class Run:
    """An opened run."""

    spec: RunSpec
    config: RunConfig
    settings: Settings
    progress: Callable[[str, float, str], None]
    """Called with (stage, share done 0..1, text) while a stage works; "" leaves the text."""

    @cached_property
    def store(self) -> Store:
        """Where results lie."""
        return open_store(self.settings.store, self.settings.cache, self.settings.s3_endpoint)


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished stage."""

    name: str
    key: str
    folder: str
    """In the store."""
    result: dict[str, Any]
    """What the stage says of itself; JSON values."""
    seconds: float
    """It took this long; in this run if `fresh`."""
    fresh: bool
    """False where an earlier run had done the work."""


STUDENT_STAGES = ("stage_one", "stage_two", "stage_three")
"""Stages that train the student, each from the one before."""


def last_of(stages: Mapping[str, Done]) -> Done:
    """The last of the stages that trained the student: the one whose model is used."""
    return next(stages[name] for name in reversed(STUDENT_STAGES) if name in stages)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage and how to do it."""

    stage: Stage
    work: Callable[[Path], dict[str, Any]]
    """Builds the result in a local folder and says what it is, in JSON values. Called again on the
    same folder if it was interrupted."""


def perform(run: Run, job: Job) -> Done:
    """Do a stage's work unless the store has its result; a result is whole or absent."""
    stage = job.stage
    with run.store.lock(stage.folder):
        found = run.store.done(stage.folder)
        fresh = found is None
        if found is None:
            began = time.monotonic()
            result = job.work(run.store.workspace(stage.folder))
            found = {
                "stage": stage.name,
                "key": stage.key,
                "config": stage.config,
                "inputs": stage.inputs,
                "result": result,
                "seconds": round(time.monotonic() - began, 2),
            }
            run.store.publish(stage.folder, found)
    return Done(
        name=stage.name,
        key=stage.key,
        folder=stage.folder,
        result=found["result"],
        seconds=found["seconds"],
        fresh=fresh,
    )

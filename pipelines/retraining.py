"""What a retraining goes on from, on what, and whether enough came for it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.digests import folder_digest
from pipelines.ingesting import LandingError
from pipelines.preparing import about_version
from pipelines.registry import (
    KEY,
    MANIFEST,
    SHA256,
    DamagedModelError,
    RegistryError,
    champion_version,
    versions_of,
)
from pipelines.release import DECISION, PARENT
from pipelines.run import Done, Job, last_of
from pipelines.stage import Stage
from pipelines.store import StoreError
from sdn.checking import check_config
from sdn.config import DataConfig, RunConfig, StageConfig, from_dict, to_key, with_overrides
from sdn.data.history import came_since
from sdn.data.sources import PREPARED
from sdn.stage_run import CONFIG

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.run import Run
    from pipelines.store import Store
    from sdn.data.manifest import Manifest

S = TypeVar("S", bound=StageConfig)
EPOCHS_SHARE, RATE_SHARE = 0.25, 0.3
"""Of length and rate of the recipe's last stage: what a retraining takes unless told otherwise."""
_OF_A_RETRAINING = (
    "stage_two.",
    "stage_three.",
    "student.noise_scale",
    "evaluation.",
    "promotion.",
    "lanes",
    "workers",
    "threads",
    "max_",
)
"""Changes that a retraining heeds; all else was settled when the first model was trained."""
_NEEDED = ("prepare", "teacher", "captions", "stage_two", "evaluate")
_FOLDER = "retraining"
"""In the store: what is being trained on, so that a later run goes on with it."""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A registered model, with the stages that made it."""

    name: str
    version: str
    config: RunConfig
    """That it was trained with."""
    start: Done
    """Its last stage, whose weights are gone on from."""
    taught: Done
    encoder: Done
    data: Done
    """What it was trained on."""
    fixed: Done
    """The same data set in the version on whose test split it was evaluated, as were its
    ancestors: figures stay comparable through time."""

    @property
    def manifest(self) -> str:
        """Digest of what it was trained on."""
        return str(self.data.result["manifest"])


def find_parent(run: Run) -> Parent | None:
    """The champion of the run's recipe; None where there is none.

    Raises:
        RegistryError: MLflow cannot be reached, or the champion was registered by other means.
        StoreError: the store does not have the stages that made it.
        DamagedModelError: its last stage is not what was registered.
    """
    name = f"sdn-{run.config.name}"
    found = champion_version(run.settings, name)
    if found is None:
        return None
    version, tags = str(found.version), dict(found.tags)
    made = stages_of(run.store, f"{name} version {version}", tags)
    start = last_of(made)
    folder = run.store.fetch(start.folder)
    digest = folder_digest(folder)
    if tags.get(SHA256, digest) != digest:
        raise DamagedModelError(
            f"expected the files of {name} version {version} in {start.folder} to have "
            f"the digest {tags[SHA256]}, but they have {digest}: they are damaged, and nothing is "
            "trained from them. Restore the folder from a backup"
        )
    return Parent(
        name=name,
        version=version,
        config=from_dict(RunConfig, json.loads((folder / CONFIG).read_text())),
        start=start,
        taught=made["teacher"],
        encoder=made["captions"],
        data=made["prepare"],
        fixed=made["fixed"],
    )


def stages_of(store: Store, title: str, tags: Mapping[str, str]) -> dict[str, Done]:
    """The stages that made a registered version, by the keys in its tags.

    Args:
        store: where they lie.
        title: of the version, for errors.
        tags: of the version.

    Returns:
        Those of `_NEEDED`, stage three where it has one, and `fixed`: its data in the version that
        its evaluation was on.

    Raises:
        RegistryError: it has no such keys.
        StoreError: the store lacks a stage.
    """
    missing = [name for name in _NEEDED if f"{KEY}.{name}" not in tags]
    if missing:
        raise RegistryError(
            f"{title} has no tags {', '.join(f'{KEY}.{name}' for name in missing)}: `sdn run` did "
            "not register it, so that nothing can go on from it"
        )
    wanted = [*_NEEDED, *(name for name in ("stage_three",) if f"{KEY}.{name}" in tags)]
    made = {name: _done_of(store, title, name, tags[f"{KEY}.{name}"]) for name in wanted}
    mark = store.done(made["evaluate"].folder) or {}
    result = made["prepare"].result | {"manifest": mark["inputs"]["data"]}
    return made | {"fixed": dataclasses.replace(made["prepare"], result=result)}


def _done_of(store: Store, title: str, name: str, key: str) -> Done:
    folder = f"stages/{name}-{key[:16]}"
    mark = store.done(folder)
    if mark is None or mark["key"] != key:
        raise StoreError(
            f"the store {store.uri} has no {folder}, which made {title}: name the store of its run "
            "with --store, or SDN_STORE"
        )
    return Done(
        name=name,
        key=key,
        folder=folder,
        result=mark["result"],
        seconds=mark["seconds"],
        fresh=False,
    )


def tried(run: Run, parent: Parent | None) -> set[str]:
    """Digests of the data versions on which models were trained from this parent, and decided on.

    Args:
        run: names the model.
        parent: the champion; None where there is none: then of all that were decided on.

    Raises:
        RegistryError: MLflow cannot be reached.
    """
    return {
        one.tags[MANIFEST]
        for one in versions_of(run.settings, f"name = 'sdn-{run.config.name}'")
        if {DECISION, MANIFEST} <= one.tags.keys()
        and (parent is None or one.tags.get(PARENT) == parent.version)
    }


def came_at_first(tried_on: set[str], versions: Sequence[Manifest]) -> int:
    """Training samples for a first model: all, or those since one that was not promoted.

    Args:
        tried_on: see `tried`.
        versions: of the data set, the newest first.
    """
    last = next((one for one in versions if one.digest in tried_on), None)
    return versions[0].samples("train") if last is None else _came(last, versions)


def came_for(parent: Parent, tried_on: set[str], versions: Sequence[Manifest]) -> int:
    """Training samples that came since the data of the parent, and of what was trained from it.

    Args:
        parent: the champion.
        tried_on: see `tried`.
        versions: of the data set, the newest first.

    Raises:
        LandingError: the champion was trained on another data set.
    """
    known = {parent.manifest} | tried_on
    last = next((one for one in versions if one.digest in known), None)
    if last is None:
        place = parent.data.result["place"] or parent.data.folder
        raise LandingError(
            f"{parent.name} version {parent.version}, the champion, was trained on no version of "
            f"this data set but on {parent.manifest[:12]} of {place}: test images of one may be "
            "training images of the other. Let that one grow, by SDN_DATASET or the field dataset, "
            "or train a first model on this one: sdn run RECIPE --set data.source=shards --set "
            "data.path=PLACE"
        )
    return _came(last, versions)


def _came(last: Manifest, versions: Sequence[Manifest]) -> int:
    came = came_since(last, versions[0])
    assert came is not None
    return came.samples("train")


def grown(config: RunConfig, dataset: str, manifest: Manifest) -> RunConfig:
    """The config with the data set that grows as its data."""
    data = DataConfig(source=PREPARED, path=dataset, resolution=manifest.resolution)
    return dataclasses.replace(config, data=data)


def unheeded(changes: Mapping[str, str]) -> list[str]:
    """Keys of changes that a first model heeds alone, not a retraining."""
    return [key for key in changes if not key.startswith(_OF_A_RETRAINING)]


def retrained(
    run: Run,
    parent: Parent,
    dataset: str,
    manifest: Manifest,
    epochs: float | None,
    rate: float | None,
) -> RunConfig:
    """The parent's config with another length and rate of its last stage, on the data that grow.

    That is stage two, or stage three where the parent has one: alone, with critics that begin anew
    at their own rate. Stage two is then one of no steps, for a version of the registry names it.

    Args:
        run: its recipe says how long the stages are, and its changes are heeded as far as they are
            about what a retraining does.
        parent: the champion.
        dataset: its place.
        manifest: its version.
        epochs: passes over the training split; None for a share of the recipe's.
        rate: learning rate; None for a share of the recipe's.

    Raises:
        ValueError: an impossible config.
    """
    left = unheeded(run.spec.overrides)
    changes = {k: v for k, v in run.spec.overrides.items() if k not in left}
    config = grown(with_overrides(parent.config, changes), dataset, manifest)

    def shorter(stage: S, own: StageConfig, *, again: bool = False) -> S:
        share, slower = (1.0, 1.0) if again else (EPOCHS_SHARE, RATE_SHARE)
        return dataclasses.replace(
            stage,
            epochs=own.epochs * share if epochs is None else epochs,
            rate=own.rate * slower if rate is None else rate,
        )

    own = run.config
    if not parent.config.stage_three.epochs:
        two = shorter(config.stage_two, own.stage_two)
        third = dataclasses.replace(config.stage_three, epochs=0.0)
        if "stage_three.epochs" in changes:  # asked for, not merely the recipe's
            third = shorter(config.stage_three, own.stage_three)
    else:
        # Distances alone would teach the student to blur again, and to ignore its noise.
        two = dataclasses.replace(config.stage_two, epochs=0.0)
        if own.stage_three.epochs:
            third = shorter(config.stage_three, own.stage_three)
        else:
            # The champion's own length then; a champion that was retrained has a share already.
            again = not parent.config.stage_two.epochs
            third = shorter(config.stage_three, parent.config.stage_three, again=again)
    found = dataclasses.replace(config, stage_two=two, stage_three=third)
    check_config(found)
    return found


def data_job(config: RunConfig, manifest: Manifest) -> Job:
    """The stage of preparation of one version of a prepared data set, whatever came since."""
    stage = Stage(name="prepare", config=to_key(config.data), inputs={"data": manifest.digest})
    return Job(stage=stage, work=lambda _: about_version(manifest, config.data.path))


def begin(run: Run, parent: Parent, manifest: Manifest) -> None:
    """Note what is trained on now: a run that is cut off goes on with it, whatever comes."""
    note = {"parent": parent.version, "manifest": manifest.digest}
    run.store.files(_FOLDER).write(f"{parent.name}.json", json.dumps(note).encode())


def begun(run: Run, parent: Parent, versions: Sequence[Manifest]) -> Manifest | None:
    """The version that an earlier run from the same parent was trained on when it was cut off."""
    try:
        note: dict[str, Any] = json.loads(run.store.files(_FOLDER).read(f"{parent.name}.json"))
    except (OSError, ValueError):
        return None
    if note.get("parent") != parent.version:
        return None
    return next((one for one in versions if one.digest == note.get("manifest")), None)


def end(run: Run, parent: Parent) -> None:
    """What was begun is decided on, or cannot be gone on with."""
    run.store.files(_FOLDER).remove(f"{parent.name}.json")

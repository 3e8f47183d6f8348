"""From a model, or an image that it drew, back to the shards, and whether all still agrees."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.digests import folder_digest
from pipelines.run import STUDENT_STAGES
from pipelines.settings import Settings
from pipelines.store import DONE, open_files, open_store, read_mark

if TYPE_CHECKING:
    from pipelines.store import Store
    from sdn.data.dataset import DataSet

SHOWN = 20
"""Shards that are named; the others are counted."""
_DRAWN_BY = ("model", "version", "uri", "caption", "seed", "sha256")
_DRAWN_WITH = ("noise_scale",)
"""What an image names where `sdn generate` was given it."""
_START = "start"
"""Role of the model that a stage starts from: the stage before, or what a champion was."""
_TRAINED = tuple(reversed(STUDENT_STAGES))
"""Stages whose folder is a model; the first that a version names is its own."""


@dataclass(kw_only=True)
class Lineage:
    """What is known of a model; JSON values throughout."""

    image: dict[str, str] | None = None
    """What a PNG file says of itself; None where no image was asked about."""
    model: dict[str, Any] = field(default_factory=dict)
    """`name`, `version`, `uri`, `aliases`, `code`, `sha256`, `registered_ms`."""
    data: dict[str, Any] = field(default_factory=dict)
    """`manifest`, `number`, `place`, `source`, `origin`, `samples`, `shards` (the first ones),
    `shard_count`, `attribution`."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """`name`, `key`, `folder`, `seconds`, `config`, `inputs` of each; the last three are None where
    the store does not have it."""
    runs: list[dict[str, str]] = field(default_factory=list)
    """See `pipelines.registry.runs_of`."""
    decision: dict[str, str] = field(default_factory=dict)
    """The version's other tags: its scores, and what it was compared with."""
    problems: list[str] = field(default_factory=list)
    """What does not agree."""
    unreached: list[str] = field(default_factory=list)
    """What could not be looked at, so that nothing is known of it."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return dataclasses.asdict(self)


def trace(target: str, store: str | None = None) -> Lineage:
    """Everything that leads to a model.

    Args:
        target: `models:/...`, the name of a registered model, a model folder, or a PNG file that
            `sdn generate` has written.
        store: in place of the configured one.

    Raises:
        ValueError: a PNG file that no model of this project has drawn.
        RegistryError: no such model.
        StoreError: the store cannot be used.
    """
    from sdn.sampling import STUDENT

    settings = Settings() if store is None else Settings(store=store)
    opened = open_store(settings.store, settings.cache, settings.s3_endpoint)
    found = Lineage()
    path = Path(target).expanduser()
    mark = None
    if path.is_file():
        found.image = drawn_by(path)
        version = _of_image(settings, found.image, found)
        folder = Path(found.image["uri"])
        mark = read_mark(folder) if version is None and folder.is_absolute() else None
    elif (path / STUDENT).is_file():
        digest = folder_digest(path)
        found.model = {"name": path.resolve().name, "uri": str(path.resolve()), "sha256": digest}
        version = _with_digest(settings, digest, found)
        mark = read_mark(path) if version is None else None
    else:
        version = _named(settings, target)
    if version is not None:
        _follow_version(settings, version, opened, found)
    elif mark is not None:
        _follow_mark(mark, settings, opened, found)
    else:
        found.unreached.append(
            "how it was trained: no registered version has its digest, and its folder has no mark "
            "of a stage; name the store of its run with --store"
        )
    _look_at_data(settings, opened, found)
    return found


def drawn_by(path: Path) -> dict[str, str]:
    """What the text chunks of a PNG file say of model and caption.

    Raises:
        ValueError: it has none that `sdn generate` writes.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            text = dict(getattr(image, "text", {}))
    except OSError as error:
        raise ValueError(
            f"{path} is no readable image ({error}); expected a PNG file that `sdn generate` "
            "wrote, a model folder, or models:/NAME@champion"
        ) from error
    missing = [name for name in _DRAWN_BY if f"sdn:{name}" not in text]
    if missing:
        raise ValueError(
            f"{path} does not say which model drew it (no {', '.join(missing)} in its metadata): "
            "only files of `sdn generate` do, as long as no other program has rewritten them"
        )
    named = [*_DRAWN_BY, *(name for name in _DRAWN_WITH if f"sdn:{name}" in text)]
    return {name: text[f"sdn:{name}"] for name in named}


def _registry_there(settings: Settings) -> bool:
    """Whether there is a registry to ask; asking would make an embedded one."""
    return settings.tracking_uri is not None or (settings.local / "mlflow.db").exists()


def _named(settings: Settings, target: str) -> Any:
    """The version that a URI or a name means; for a name its champion, else its newest."""
    from pipelines.registry import RegistryError, find_version, versions_of

    if not _registry_there(settings):
        raise RegistryError(
            f"no model {target}: it is no folder or file, and nothing is registered in "
            f"{settings.store}; name the store with --store"
        )
    try:
        return find_version(settings, target)
    except RegistryError:
        if any(sign in target for sign in ":/@'"):
            raise
        newest = versions_of(settings, f"name = '{target}'")
        if not newest:
            raise
        return newest[0]


def _with_digest(settings: Settings, digest: str, found: Lineage) -> Any | None:
    """The newest version registered from a folder of this digest."""
    from pipelines.registry import SHA256, RegistryError, versions_of

    if not _registry_there(settings):
        found.unreached.append(f"registry: none in {settings.store}")
        return None
    try:
        versions = versions_of(settings, f"tags.`{SHA256}` = '{digest}'")
    except RegistryError as error:
        found.unreached.append(f"registry: {error}")
        return None
    return versions[0] if versions else None


def _of_image(settings: Settings, image: dict[str, str], found: Lineage) -> Any | None:
    """The version that an image names, if its digest is the image's; else one of that digest."""
    from pipelines.registry import SHA256, RegistryError, find_version

    found.model = {"name": image["model"], "uri": image["uri"], "sha256": image["sha256"]}
    if image["version"] and _registry_there(settings):
        try:
            version = find_version(settings, image["uri"])
        except RegistryError as error:
            found.unreached.append(f"registry: {error}")
        else:
            registered = version.tags.get(SHA256)
            if registered == image["sha256"]:
                return version
            found.problems.append(
                f"{image['uri']} in this registry has the model folder {registered}, the image was "
                f"drawn by {image['sha256']}: another registry, or a version made anew"
            )
    return _with_digest(settings, image["sha256"], found)


def _follow_version(settings: Settings, version: Any, store: Store, found: Lineage) -> None:
    """Fill in what a registered version says, and compare it with what lies here."""
    from pipelines.registry import (
        CODE,
        KEY,
        MANIFEST,
        SHA256,
        DamagedModelError,
        RegistryError,
        model_folder,
        runs_of,
    )

    tags, uri = dict(version.tags), f"models:/{version.name}/{version.version}"
    digest = tags.get(SHA256)
    found.model = {
        "name": version.name,
        "version": str(version.version),
        "uri": uri,
        "aliases": sorted(version.aliases or []),
        "code": tags.get(CODE),
        "sha256": digest,
        "registered_ms": version.creation_timestamp,
    }
    stages = {
        name.removeprefix(f"{KEY}."): key
        for name, key in tags.items()
        if name.startswith(f"{KEY}.")
    }
    known = {CODE, KEY, MANIFEST, SHA256}
    found.decision = {
        name: value
        for name, value in sorted(tags.items())
        if name.startswith("sdn.") and name not in known and not name.startswith(f"{KEY}.")
    }
    found.data = {"manifest": tags.get(MANIFEST)}
    try:
        model_folder(settings, uri)
    except DamagedModelError as error:
        found.problems.append(str(error))
    except RegistryError as error:
        found.unreached.append(str(error))
    if digest is None:
        found.unreached.append(f"{uri} has no tag {SHA256}: an older version registered it")
    if not stages or MANIFEST not in tags:
        found.unreached.append(
            f"how it was trained: {uri} has no tags {KEY}.* or {MANIFEST}; `sdn run` did not "
            "register it"
        )
    _follow_stages(stages, store, found)
    own = next((one for one in found.stages if one["name"] in _TRAINED), None)
    if own is not None and own["config"] is not None and digest is not None:
        came = folder_digest(store.fetch(own["folder"]))
        if came != digest:
            found.problems.append(
                f"{own['folder']} in {store.uri} has SHA-256 {came}, registered was {digest}: the "
                "folder was changed since"
            )
    try:
        found.runs = runs_of(settings, version.run_id)
    except RegistryError as error:
        found.unreached.append(str(error))


def _follow_mark(mark: dict[str, Any], settings: Settings, store: Store, found: Lineage) -> None:
    """Fill in what the mark of a model's stage says of what it was made from."""
    inputs = dict(mark.get("inputs", {}))
    found.data = {"manifest": inputs.pop("data", None)}
    start = inputs.pop(_START, None)
    stages = {str(mark["stage"]): str(mark["key"])} | inputs
    name = mark["stage"]
    while start is not None:
        before = STUDENT_STAGES[: STUDENT_STAGES.index(name)]
        name = next((one for one in before if store.done(f"stages/{one}-{start[:16]}")), _START)
        stages[name] = start
        own = None if name == _START else store.done(_folder(name, start, store))
        start = None if own is None else own.get("inputs", {}).get(_START)
    prepared = _prepared(settings, store, found.data["manifest"])
    if prepared is not None:
        stages["prepare"] = prepared
    _follow_stages(stages, store, found)


def _prepared(settings: Settings, store: Store, manifest: str | None) -> str | None:
    """Key of a stage in the store that prepared this data version."""
    stages = open_files(f"{store.uri}/stages", settings.cache, settings.s3_endpoint)
    for info in stages.walk():
        folder, _, name = info.name.partition("/")
        if folder.startswith("prepare-") and name == DONE:
            mark = store.done(f"stages/{folder}") or {}
            if mark.get("result", {}).get("manifest") == manifest:
                return str(mark["key"])
    return None


def _follow_stages(keys: dict[str, str], store: Store, found: Lineage) -> None:
    """Read the marks of these stages, the model's own first."""
    rank = {name: number for number, name in enumerate(_TRAINED)}
    order = sorted(keys, key=lambda name: rank.get(name, len(rank)))
    for name in order:
        key = keys[name]
        folder = _folder(name, key, store)
        mark = store.done(folder)
        if mark is None:
            found.unreached.append(f"{name}: the store {store.uri} has no {folder}")
        elif mark["key"] != key:
            found.problems.append(
                f"{folder} in {store.uri} has the key {mark['key']}, expected {key}"
            )
        values = {part: (mark or {}).get(part) for part in ("seconds", "config", "inputs")}
        found.stages.append({"name": name, "key": key, "folder": folder, **values})
        if name == "prepare" and mark is not None:
            _compare_manifest(mark["result"]["manifest"], folder, found)
            found.data["place"] = mark["result"]["place"] or store.files(folder).uri


def _folder(name: str, key: str, store: Store) -> str:
    """Where a stage lies; what a retraining starts from is the last stage of another model."""
    names = ("stage_two", "stage_three") if name == _START else (name,)
    folders = [f"stages/{one}-{key[:16]}" for one in names]
    return next((folder for folder in folders if store.done(folder) is not None), folders[0])


def _compare_manifest(came: str, folder: str, found: Lineage) -> None:
    expected = found.data.setdefault("manifest", came) or came
    found.data["manifest"] = expected
    if came != expected:
        found.problems.append(
            f"{folder} made the data version {came}, the model was trained on {expected}"
        )


def _look_at_data(settings: Settings, store: Store, found: Lineage) -> None:
    """Open the data version and name its source and first shards."""
    from sdn.data.dataset import open_dataset

    manifest, place = found.data.get("manifest"), found.data.get("place")
    if manifest is None:
        return
    if place is None:
        found.unreached.append(
            f"data version {manifest}: no stage in {store.uri} says where it lies"
        )
        return
    files = open_files(place, settings.cache, settings.s3_endpoint, settings.cache_gib)
    try:
        dataset = open_dataset(files, manifest)
        found.data |= _data_of(dataset)
    except (ValueError, OSError) as error:
        found.unreached.append(f"data version {manifest} at {place}: {error}")
        return
    if dataset.manifest.digest != manifest:
        found.problems.append(
            f"the manifest at {place} has the digest {dataset.manifest.digest}, expected {manifest}"
        )
    for shard in found.data["shards"]:
        if not files.exists(shard["name"]):
            found.problems.append(f"{place} lacks the shard {shard['name']}")
        elif (size := files.size(shard["name"])) != shard["bytes"]:
            found.problems.append(
                f"{shard['name']} at {place} has {size} bytes, expected {shard['bytes']}; `sdn "
                f"verify {place}` reads every byte"
            )


def _data_of(dataset: DataSet) -> dict[str, Any]:
    from sdn.data.records import SPLITS

    manifest = dataset.manifest
    tables = [dataset.shards(split) for split in SPLITS]
    return {
        "number": manifest.number,
        "source": manifest.preparation.get("source"),
        "origin": manifest.origin,
        "samples": manifest.counts,
        "attribution": manifest.attribution,
        "shard_count": sum(len(table) for table in tables),
        "shards": [
            {
                "name": shard.name,
                "samples": shard.samples,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
            }
            for shard in islice(chain.from_iterable(tables), SHOWN)
        ],
    }

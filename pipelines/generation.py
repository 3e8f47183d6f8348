"""Finding a model, drawing with it, and scoring it."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.digests import folder_digest
from pipelines.run import RunSpec, perform
from pipelines.settings import Settings
from pipelines.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from pipelines.run import Done, Job, Run


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model that lies on this machine, and what it is."""

    folder: Path
    name: str
    """Of the registered model; of a folder, its name."""
    version: str
    """Number in the registry; "" for a folder."""
    uri: str
    """`models:/NAME/VERSION`, or the folder."""
    sha256: str
    """Of the folder, see `pipelines.digests.folder_digest`."""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name} version {self.version}" if self.version else self.uri


def find_model(model: str | None, store: str | None) -> FoundModel:
    """A model on this machine: fetched from the registry where it is not a folder.

    Args:
        model: a model folder, `models:/...`, or None for the champion registered last.
        store: in place of the configured one.

    Raises:
        RegistryError: no such model in the registry, or its files are damaged.
    """
    from sdn.sampling import STUDENT

    if model is not None and (Path(model).expanduser() / STUDENT).is_file():
        folder = Path(model).expanduser().resolve()
        return FoundModel(
            folder=folder,
            name=folder.name,
            version="",
            uri=str(folder),
            sha256=folder_digest(folder),
        )
    from pipelines.registry import CHAMPION, RegistryError, champions, model_folder

    settings = Settings() if store is None else Settings(store=store)
    if settings.tracking_uri is None and not (settings.local / "mlflow.db").exists():
        wanted = f"no model {model}: " if model else ""
        raise RegistryError(
            f"{wanted}nothing is registered in {settings.store}: `sdn run` trains and registers a "
            "model, --model names a model folder, --store another store"
        )
    if model is None:
        names = champions(settings)
        if not names:
            raise RegistryError(
                f"no champion is registered in {settings.store}: `sdn run` trains and registers "
                "one, --model names another model, --store another store"
            )
        model = f"models:/{names[0]}@{CHAMPION}"
    folder, name, version = model_folder(settings, model)
    return FoundModel(
        folder=folder,
        name=name,
        version=version,
        uri=f"models:/{name}/{version}",
        sha256=folder_digest(folder),
    )


def draw(folder: Path, captions: Sequence[str], *, seed: int = 0) -> Tensor:
    """(N, 3, H, W) uint8 pixels of N captions.

    Args:
        folder: of a model.
        captions: at least one.
        seed: of the noise, for models that have some.

    Raises:
        TypeError, ValueError: a caption that no picture can be made of, or a damaged model.
        FileNotFoundError: the folder holds no model.
    """
    from sdn.sampling import open_synthesizer

    return open_synthesizer(folder)(captions, seed=seed)


def image_metadata(model: FoundModel, caption: str, seed: int) -> dict[str, str]:
    """Text chunks of a PNG file by which `sdn lineage` finds the model that drew it."""
    values = {
        "model": model.name,
        "version": model.version,
        "uri": model.uri,
        "caption": caption,
        "seed": str(seed),
        "sha256": model.sha256,
    }
    return {f"sdn:{name}": value for name, value in values.items()}


def write_images(
    pixels: Tensor, captions: Sequence[str], out: Path | None, *, model: FoundModel, seed: int
) -> list[Path]:
    """Write PNG files that say in their metadata which model drew what.

    Args:
        pixels: (N, 3, H, W) uint8.
        captions: N of them.
        out: the file of a single image, else a folder; None writes into the current folder.
        model: what drew them.
        seed: kept in the metadata.
    """
    from sdn.sampling import encode_png

    single = out is not None and len(captions) == 1 and out.suffix.lower() == ".png"
    folder = out.parent if single and out is not None else out or Path()
    folder.mkdir(parents=True, exist_ok=True)
    names: list[Path] = []
    for n, caption in enumerate(captions):
        base = re.sub(r"\W+", "-", caption.lower()).strip("-")[:60] or "image"
        path = out if single and out is not None else folder / f"{base}.png"
        number = n
        while path in names:
            path = folder / f"{base}-{number}.png"
            number += 1
        path.write_bytes(encode_png(pixels[n], image_metadata(model, caption, seed)))
        names.append(path)
    return names


def score_model(
    model: str | None,
    store: str | None,
    overrides: dict[str, str],
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Scores of a model on the test split of the data it was trained for; trains nothing.

    Args:
        model: as for `find_model`.
        store: in place of the configured one; holds the model's data set and teacher.
        overrides: changes to the config that the model was trained with.
        report: called with the name of each row when it is scored.

    Raises:
        StoreError: the model's data or teacher are not in the store.
        RegistryError: no such model.
    """
    from pipelines import work
    from pipelines.preparing import data_set
    from sdn.config import RunConfig, from_dict, with_overrides
    from sdn.evaluation import evaluate
    from sdn.stage_run import CONFIG, StageInputs

    found_model = find_model(model, store)
    folder, name = found_model.folder, found_model.title
    saved = json.loads((folder / CONFIG).read_text())
    config = with_overrides(from_dict(RunConfig, saved), overrides)
    run = RunSpec(config.name, store=store).open()
    run = dataclasses.replace(run, config=config)
    data = _already(run, work.prepare(run))
    taught = _already(run, work.teacher(run, data))
    encoder = _already(run, work.captions(run, data, taught))
    inputs = StageInputs(
        data=data_set(run, data),
        teacher=run.store.fetch(taught.folder),
        captions=run.store.fetch(encoder.folder),
    )
    found = evaluate(config, inputs, {name: folder}, report)
    return {"model": name, "captions": len(found.captions), "scores": found.scores}


def _already(run: Run, job: Job) -> Done:
    """A stage that must be finished."""
    if run.store.done(job.stage.folder) is None:
        raise StoreError(
            f"the store {run.store.uri} has no {job.stage.folder}, which this model is scored "
            f"with: name the store of its run with --store, or make it with `sdn run "
            f"{run.config.name}`"
        )
    return perform(run, job)

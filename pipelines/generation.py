"""Finding a model, drawing with it, and scoring it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.run import RunSpec, perform
from pipelines.settings import Settings
from pipelines.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from pipelines.run import Done, Job, Run


def find_model(model: str | None, store: str | None) -> tuple[Path, str]:
    """A local model folder and the name of what it is.

    Args:
        model: a model folder, `models:/...`, or None for the champion registered last.
        store: in place of the configured one.

    Raises:
        RegistryError: no such model in the registry.
    """
    from sdn.sampling import STUDENT

    if model is not None and (Path(model).expanduser() / STUDENT).is_file():
        return Path(model).expanduser(), model
    from pipelines.tracking import CHAMPION, RegistryError, champions, model_folder

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
    return model_folder(settings, model)


def draw(folder: Path, captions: Sequence[str]) -> Tensor:
    """(N, 3, H, W) uint8 pixels of N captions.

    Raises:
        TypeError, ValueError: a caption that no picture can be made of.
    """
    from sdn.sampling import open_synthesizer

    return open_synthesizer(folder)(captions)


def write_images(
    pixels: Tensor, captions: Sequence[str], out: Path | None, *, model: str, seed: int
) -> list[Path]:
    """Write PNG files that say in their metadata which model drew what.

    Args:
        pixels: (N, 3, H, W) uint8.
        captions: N of them.
        out: the file of a single image, else a folder; None writes into the current folder.
        model: name of the model.
        seed: kept in the metadata.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

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
        info = PngInfo()
        for key, value in {"model": model, "caption": caption, "seed": str(seed)}.items():
            info.add_itxt(f"sdn:{key}", value)
        image = Image.fromarray(pixels[n].permute(1, 2, 0).contiguous().numpy())
        image.save(path, pnginfo=info)
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

    folder, name = find_model(model, store)
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

"""Finding a model and drawing with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.digests import folder_digest
from pipelines.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


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


def draw(
    folder: Path,
    captions: Sequence[str],
    *,
    seed: int = 0,
    each: int = 1,
    noise_scale: float | None = None,
) -> Tensor:
    """(N * each, 3, H, W) uint8 pixels of N captions, those of a caption together.

    Args:
        folder: of a model.
        captions: at least one.
        seed: of the noise, for models that have some.
        each: images of a caption, with this seed and those that follow it.
        noise_scale: of the noise, in place of the model's own.

    Raises:
        TypeError, ValueError: a caption that no picture can be made of, a damaged model, or several
            images of a caption, or a noise scale, for a model without noise.
        FileNotFoundError: the folder holds no model.
    """
    import torch

    from sdn.sampling import open_synthesizer

    model = open_synthesizer(folder)
    if each > 1 and not model.noise:
        raise ValueError(
            f"{each} images of a caption: the model has no noise and draws one; leave --each out, "
            "or train with student.noise=32 and a stage three"
        )
    if noise_scale is not None and not model.noise:
        raise ValueError("a noise scale for a model that has no noise: leave --noise-scale out")
    seeds = range(seed, seed + each)
    drawn = [model(captions, seed=one, noise_scale=noise_scale) for one in seeds]
    return torch.stack(drawn, dim=1).flatten(0, 1)


def image_metadata(
    model: FoundModel, caption: str, seed: int, noise_scale: float | None = None
) -> dict[str, str]:
    """Text chunks of a PNG file by which `sdn lineage` finds the model that drew it."""
    values = {
        "model": model.name,
        "version": model.version,
        "uri": model.uri,
        "caption": caption,
        "seed": str(seed),
        "sha256": model.sha256,
    }
    if noise_scale is not None:
        values["noise_scale"] = str(noise_scale)
    return {f"sdn:{name}": value for name, value in values.items()}


def names_a_file(out: Path | None, images: int) -> bool:
    """Whether `out` is the file of a single image, not a folder.

    Raises:
        ValueError: several images into one file, or a file of another kind.
    """
    from sdn.data.sources.folder import IMAGES

    if out is None or out.is_dir():
        return False
    suffix = out.suffix.lower()
    if suffix != ".png":
        if out.is_file() or suffix in IMAGES:
            raise ValueError(f"images are written as PNG: {out} must end in .png, or be a folder")
        return False
    if images > 1:
        raise ValueError(f"{out} names one file, but {images} images are drawn; name a folder")
    return True


def write_images(
    pixels: Tensor,
    captions: Sequence[str],
    out: Path | None,
    *,
    model: FoundModel,
    seed: int,
    each: int = 1,
    noise_scale: float | None = None,
) -> list[Path]:
    """Write PNG files that say in their metadata which model drew what.

    Args:
        pixels: (N * each, 3, H, W) uint8, as of `draw`.
        captions: N of them.
        out: the file of a single image, else a folder; None writes into the current folder.
        model: what drew them.
        seed: of the first image of each caption; kept in the metadata, as are those that follow.
        each: images of a caption.
        noise_scale: as given to `draw`.

    Raises:
        ValueError: several images into one file.
    """
    from sdn.sampling import encode_png

    single = names_a_file(out, len(pixels))
    folder = out.parent if single and out is not None else out or Path()
    folder.mkdir(parents=True, exist_ok=True)
    bases: list[str] = []
    paths: list[Path] = []
    for n, caption in enumerate(captions):
        plain = re.sub(r"\W+", "-", caption.lower()).strip("-")[:60] or "image"
        base, number = plain, n
        while base in bases:
            base, number = f"{plain}-{number}", number + 1
        bases.append(base)
        for k in range(each):
            # Another seed or noise scale is another image: it overwrites none.
            of_seed = f"-seed-{seed + k}" if each > 1 or seed else ""
            of_scale = "" if noise_scale is None else f"-noise-{noise_scale}"
            path = out if single and out is not None else folder / f"{base}{of_seed}{of_scale}.png"
            about = image_metadata(model, caption, seed + k, noise_scale)
            path.write_bytes(encode_png(pixels[n * each + k], about))
            paths.append(path)
    return paths

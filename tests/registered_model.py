"""A small untrained model, the samples that an evaluation keeps of it, and its registration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.model_check import SAMPLES
from pipelines.registry import register
from pipelines.settings import Settings
from pipelines.tracking import Tracker
from sdn.captions import new_encoder, save_encoder
from sdn.config import CaptionConfig, DataConfig, RunConfig, StudentConfig, TeacherConfig
from sdn.sampling import ENCODER, encode_png, open_synthesizer
from sdn.stage_run import new_student, write_model

if TYPE_CHECKING:
    from pathlib import Path

NAME = "sdn-small"
CAPTIONS = ("a red house", "two dogs: dark", "keycap 5", "a red house")
SEEDS = (0, 0, 1, 1)
CONFIG = RunConfig(
    name="small",
    data=DataConfig(resolution=32),
    teacher=TeacherConfig(arch="vgg11", width=0.05),
    student=StudentConfig(init="he"),  # what it draws differs from caption to caption
    captions=CaptionConfig(dim=8, width=8, max_chars=40),
)


def write_small_model(folder: Path, config: RunConfig = CONFIG) -> Path:
    """A model folder with untrained weights."""
    captions = folder.with_name(f"{folder.name}-captions")
    for path in (folder, captions):
        path.mkdir(parents=True)
    save_encoder(new_encoder(config.captions), captions / ENCODER)
    write_model(folder, config, captions, new_student(config).state_dict())
    return folder


def write_samples(folder: Path, model: Path) -> Path:
    """What an evaluation keeps: PNG files and their list."""
    folder.mkdir(parents=True)
    synthesizer = open_synthesizer(model)
    listed = []
    for number, (caption, seed) in enumerate(zip(CAPTIONS, SEEDS, strict=True)):
        name = f"{number:02d}.png"
        (folder / name).write_bytes(encode_png(synthesizer([caption], seed=seed)[0]))
        listed.append({"caption": caption, "seed": seed, "file": name})
    (folder / SAMPLES).write_text(json.dumps({"samples": listed}))
    return folder


@dataclass(frozen=True)
class Place:
    """A store with a model, its samples, and MLflow."""

    store: Path
    model: Path
    samples: Path
    tracker: Tracker
    packages: tuple[str, ...] = ()

    def register(self, *, key: str = "key", tags: dict[str, str] | None = None) -> dict[str, Any]:
        """Register the model; the answer of `register`."""
        return register(
            self.tracker,
            self.tracker.run("small", "parent"),
            self.model,
            name=NAME,
            caption=CAPTIONS[0],
            card="small",
            tags=tags or {},
            key=key,
            samples=self.samples,
            packages=self.packages,
        )


def place(
    folder: Path,
    tracking_uri: str | None = None,
    config: RunConfig = CONFIG,
    packages: tuple[str, ...] = (),
) -> Place:
    """A fresh place in an empty folder, with nothing registered yet; MLflow there or on SQLite."""
    store = folder / "store"
    model = write_small_model(store / "stages" / "stage_two-0123456789abcdef", config)
    samples = write_samples(folder / "samples", model)
    settings = Settings(store=str(store), tracking_uri=tracking_uri)
    return Place(store, model, samples, Tracker(settings, "small"), packages)

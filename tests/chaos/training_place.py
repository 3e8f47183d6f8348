"""A small stage with everything that it reads, and the process that trains it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import tiny_data
import torch

from pipelines.store import LocalStore, Store
from pipelines.worker import StageOrder
from sdn.captions import new_encoder, save_encoder
from sdn.config import (
    CaptionConfig,
    RunConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
    from_dict,
    to_dict,
)
from sdn.data.dataset import open_dataset
from sdn.sampling import ENCODER
from sdn.stage_run import TAP_MEANS, TEACHER
from sdn.teacher import empty_teacher, save_teacher

SAMPLES = 90
STAGE = StageConfig(
    epochs=100,
    global_batch=6,
    rate=1e-3,
    schedule="one-cycle",
    scale="relative",
    average_share=0.1,
    precision="float32",
    checkpoint_images=600,
)
CONFIG = RunConfig(
    name="chaos",
    data=tiny_data.CONFIG,
    teacher=TeacherConfig(arch="vgg11", width=0.05, convention="symmetric"),
    captions=CaptionConfig(dim=12, width=8, max_chars=32),
    student=StudentConfig(init="he"),
    stage_one=STAGE,
    stage_two=STAGE,
    lanes=12,
    threads=1,
)


def write_store(folder: Path, store: Store | None = None) -> None:
    """Data set, teacher and caption encoder, as finished folders of a store.

    Args:
        folder: the store, or what of it stays on the disk: the data set.
        store: where teacher and encoder go instead.
    """
    here = LocalStore(folder)
    store = here if store is None else store
    tiny_data.write(here.workspace("data"), tiny_data.records(train=SAMPLES, test=4))
    here.publish("data", {})
    torch.manual_seed(0)
    teacher = empty_teacher(CONFIG.teacher)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    place = store.workspace("teacher")
    save_teacher(teacher, place / TEACHER)
    (place / TAP_MEANS).write_text(json.dumps(dict.fromkeys(teacher.names, 0.5)))
    store.publish("teacher", {})
    save_encoder(new_encoder(CONFIG.captions), store.workspace("captions") / ENCODER)
    store.publish("captions", {})


def order_of(folder: Path, name: str, ranks: int = 1, stall_s: float = 60, **stage) -> StageOrder:
    """The order of a training of stage one in a store that `write_store` has filled."""
    config = dataclasses.replace(CONFIG, stage_one=dataclasses.replace(STAGE, **stage))
    return StageOrder(
        stage="stage_one",
        name=name,
        config=to_dict(config),
        store=str(folder),
        cache=str(folder / "cache"),
        cache_gib=1.0,
        endpoint=None,
        data=str(folder / "data"),
        version=open_dataset(folder / "data").manifest.digest,
        inputs={"teacher": "teacher", "captions": "captions"},
        threads=1,
        workers=(ranks, ranks),
        stall_s=stall_s,
        grace_s=20,
    )


def main(path: str) -> None:
    """Train the order in the file to its end; say each report as a line of JSON."""
    from pipelines.cluster import start_ray, stop_ray
    from pipelines.orphans import ended_with_this_process
    from pipelines.settings import Settings
    from pipelines.supervising import train_stage

    values = json.loads(Path(path).read_text())
    values["workers"] = tuple(values["workers"])
    order = StageOrder(**values)
    from_dict(RunConfig, order.config)
    with ended_with_this_process():
        start_ray(Settings())
        try:
            last = train_stage(
                order, listen=lambda kind, values: print(json.dumps([kind, values]), flush=True)
            )
        finally:
            stop_ray()
    print(json.dumps(["done", {"step": last.step}]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

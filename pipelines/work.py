"""What each stage of the pipeline is and does; the flows put them in order."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.cluster import cores, start_ray
from pipelines.points import write_points
from pipelines.preparing import data_set, data_uri, prepare_into_store, prepare_stage
from pipelines.run import Done, Job, Run
from pipelines.stage import Stage
from pipelines.supervising import finished, train_stage
from pipelines.worker import StageOrder
from sdn.config import to_dict, to_key
from sdn.data.sources import PREPARED

if TYPE_CHECKING:
    from sdn.checkpoint import Checkpoint
    from sdn.config import RunConfig, StageConfig

logger = logging.getLogger(__name__)
LEAST_TEST = 6
"""Test images below which no swap of two models' images is rarer than 2.5%."""
_AUDITED = 5_000_000
"""Images of a stage up to which its ledger is followed at its end."""


def prepare(run: Run) -> Job:
    """Captioned images become shards, indexes and a manifest."""
    stage = prepare_stage(run.config.data, run.settings)

    def report(step: str, done: int, total: int | None) -> None:
        noun = {"read": "records", "written": "shards"}[step]
        of = f" of {total:,}" if total else ""
        # Reading is nearly all of the work, and how much there is to read is not known before.
        share = 0.9 + 0.1 * done / total if total else min(0.9, done / (done + 1000))
        run.progress("prepare", share, f"{done:,}{of} {noun} {step}")

    return Job(stage=stage, work=lambda _: prepare_into_store(run, stage.folder, report))


def check_splits(config: RunConfig, samples: dict[str, int]) -> None:
    """Refuse data on which a later stage would fail, before anything is trained.

    Raises:
        ValueError: no test split, or no validation split where trials are to be ranked on it.
    """
    found = ", ".join(f"{split} {count}" for split, count in samples.items())
    if not samples.get("test"):
        raise ValueError(
            f"the data set has no test images to evaluate on ({found}): raise data.test_share, add "
            "images, or put some into a folder named test"
        )
    if samples["test"] < LEAST_TEST:
        raise ValueError(
            f"the data set has {samples['test']} test images ({found}); no difference between two "
            f"models can be shown on fewer than {LEAST_TEST}: raise data.test_share or add images"
        )
    held = samples.get("validation", 0)
    if config.search.trials > 1 and held < LEAST_TEST:
        made = config.data.source == PREPARED
        raised = "prepare the data set anew with a larger" if made else "raise"
        raise ValueError(
            f"the data set has {held or 'no'} validation images to rank trials on, and needs "
            f"{LEAST_TEST} ({found}): {raised} data.validation_share or, where files, folders or "
            "fields say which images are to train, have it drawn from those with "
            "data.validation_from_train=true, or put some into a file or folder named validation; "
            "or search nothing with --set search.trials=0"
        )


def teacher(run: Run, data: Done) -> Job:
    """The frozen classifier: pretrained weights, or fitted on the training split's labels."""
    config = run.config.teacher
    inputs = {"data": data.result["manifest"]}
    if config.weights is not None and "://" not in config.weights:
        from sdn.teacher import fetch_weights, file_digest

        path = fetch_weights(config.weights, config.sha256, "teacher.weights")
        inputs["weights"] = file_digest(path)
    stage = Stage(name="teacher", config=to_dict(config), inputs=inputs)

    def work(folder: Path) -> dict[str, Any]:
        from sdn.fitting import write_teacher

        order = order_of(run, stage, run.config, {"data": data}, batch=config.batch)
        torch.set_num_threads(cores(run.settings))
        said = Said(run, "teacher")
        result = write_teacher(
            folder,
            data_set(run, data),
            config,
            fit=lambda _: _trained(run, order, folder, said).weights(),
            report=lambda share, text: run.progress("teacher", share, text),
        )
        return result | said.result()

    return Job(stage=stage, work=work)


def captions(run: Run, data: Done, taught: Done) -> Job:
    """The caption encoder, trained against teacher features and frozen."""
    stage = Stage(
        name="captions",
        config=to_dict(run.config.captions),
        inputs={"data": data.result["manifest"], "teacher": taught.result["sha256"]},
    )

    def work(folder: Path) -> dict[str, Any]:
        from sdn.fitting import write_captions

        config = run.config.captions
        inputs = {"data": data, "teacher": taught}
        order = order_of(run, stage, run.config, inputs, batch=config.batch)
        torch.set_num_threads(cores(run.settings))
        said = Said(run, "captions")
        result = write_captions(
            folder,
            data_set(run, data),
            run.store.fetch(taught.folder),
            config,
            fit=lambda _: _trained(run, order, folder, said).weights(),
            report=lambda share, text: run.progress("captions", share, text),
        )
        return result | said.result()

    return Job(stage=stage, work=work)


class Said:
    """What the ranks of a stage say while it is trained, and what of it becomes its result."""

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name = run, name
        self.workers: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.computing_s = 0.0
        self.ledger: dict[str, Any] | None = None

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        """See `pipelines.supervising.train_stage`."""
        if kind == "step":
            left = (values["steps"] - values["step"]) / max(1, values["step"])
            self._run.progress(
                self._name,
                values["step"] / values["steps"],
                f"loss {values['losses']['loss/total']:.3f}, {values['images_per_s']:.0f} images/s"
                f"{_remaining(values, left)}",
            )
        elif kind == "opening":
            self._run.progress(self._name, 0.0, values["text"])
        elif kind == "worker":
            self.workers.append(values)
        elif kind == "computed":
            self.computing_s += values["seconds"]
        elif kind == "failed":
            self.failures.append(values["text"])
            self._run.progress(self._name, 0.0, f"goes on after: {values['text']}")
        else:
            logger.warning("%s: %s", self._name, values.get("text", kind))

    def result(self) -> dict[str, Any]:
        """For the stage's mark."""
        return {
            "workers": self.workers,
            "failures": self.failures,
            "computing_s": round(self.computing_s, 2),
            "ledger": self.ledger,
        }


def _remaining(values: dict[str, Any], left: float) -> str:
    """The time that is left at the rate of the last window."""
    if values["images_per_s"] <= 0 or values["step"] >= values["steps"]:
        return ""
    seconds = values["images_seen"] * left / values["images_per_s"]
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f", {f'{hours}:' if hours else ''}{minutes:02d}:{seconds:02d} left"


def _trained(run: Run, order: StageOrder, folder: Path, said: Said) -> Checkpoint:
    """The last checkpoint of a stage's training, which is done if it has not been."""
    last = finished(order)
    if last is None and run.settings.ray_address is not None:
        from pipelines.jobs import train_as_job

        last = train_as_job(order, run.settings.ray_address, listen=said)
    elif last is None:
        start_ray(run.settings)
        last = train_stage(order, listen=said)
    write_points(order.place(), folder)
    said.ledger = _audited(order, last)
    return last


def distillation_stage(run: Run, name: str, stage: StageConfig, inputs: dict[str, str]) -> Stage:
    """Key of a stage of the student: its config, what shapes the student, and its inputs.

    The noise scale is of the model that a stage writes, so another one is another stage. The number
    of workers is no part of it: the samples and their order do not depend on it.
    """
    config = {
        "stage": to_dict(stage),
        "student": to_key(run.config.student),
        "lanes": run.config.lanes,
    }
    return Stage(name=name, config=config, inputs=inputs)


def order_of(
    run: Run, stage: Stage, config: RunConfig, inputs: dict[str, Done], *, batch: int
) -> StageOrder:
    """What a stage's workers are told; the config may have other values than the run's."""
    data = inputs["data"]
    workers = possible_workers(config, batch, run)
    return StageOrder(
        stage=stage.name,
        name=stage.short,
        config=to_dict(config),
        store=run.store.uri,
        cache=str(run.settings.cache.expanduser()),
        cache_gib=run.settings.cache_gib,
        endpoint=run.settings.s3_endpoint,
        data=data_uri(run, data),
        version=data.result["manifest"],
        inputs={role: done.folder for role, done in inputs.items() if role != "data"},
        threads=_threads(run, config, workers[1]),
        workers=workers,
        stall_s=run.settings.stall_s,
        grace_s=run.settings.grace_s,
    )


def _threads(run: Run, config: RunConfig, workers: int) -> int:
    """Threads of a worker: its share of this machine's cores; a cluster's nodes have others."""
    here = cores(run.settings)
    if run.settings.ray_address is not None:
        return config.threads or 1
    return min(config.threads or here, max(1, here // workers))


def possible_workers(config: RunConfig, batch: int, run: Run) -> tuple[int, int]:
    """Fewest and most workers of a stage: the recipe's, on this machine at most one a core."""
    most = config.workers if config.max_workers is None else config.max_workers
    wanted = (config.workers, most)
    if run.settings.ray_address is not None and most <= batch:
        return wanted
    limit = batch if run.settings.ray_address is not None else min(batch, cores(run.settings))
    possible = [n for n in range(1, most + 1) if n <= limit and config.lanes % n == 0]
    return min(config.workers, possible[-1]), possible[-1]


def distil(run: Run, name: str, inputs: dict[str, Done], config: RunConfig | None = None) -> Job:
    """Stage one or stage two of the student, on Ray Train.

    Args:
        run: the run.
        name: `stage_one` or `stage_two`.
        inputs: role -> finished stage: data, teacher, captions, and start for stage two.
        config: in place of the recipe's, with what a search has found.
    """
    config = run.config if config is None else config
    stage_config: StageConfig = getattr(config, name)
    stage = distillation_stage(run, name, stage_config, keys_of(inputs))

    def work(folder: Path) -> dict[str, Any]:
        from sdn.stage_run import write_model

        order = order_of(run, stage, config, inputs, batch=stage_config.global_batch)
        said = Said(run, name)
        last = _trained(run, order, folder, said)
        write_model(folder, config, run.store.fetch(inputs["captions"].folder), last.weights())
        return {
            "steps": last.step,
            "images_seen": last.images_seen,
            "precision": last.precision,
            "weights": to_dict(stage_config.weights),
            "rate": stage_config.rate,
            **said.result(),
        }

    return Job(stage=stage, work=work)


def _audited(order: StageOrder, last: Checkpoint) -> dict[str, Any]:
    """What the ledger proves of a finished training; very long ones are left to `sdn ledger`.

    Raises:
        ValueError: samples were lost or came twice.
    """
    from sdn.auditing import audit_training

    if last.images_seen > _AUDITED:
        return {"checked": False}
    found = audit_training(
        order.stage, order.run_config(), order.dataset(), order.place(), last.step
    )
    if found.problems:
        raise ValueError(f"the ledger of {order.name} does not add up: {'; '.join(found.problems)}")
    return {
        "checked": True,
        "samples": found.samples,
        "epochs": found.epochs,
        "lost": found.lost,
        "twice": found.twice,
        "attempts": len(found.attempts),
        "rolled_back": found.rolled_back,
    }


def keys_of(inputs: dict[str, Done]) -> dict[str, str]:
    """What the inputs of a stage are known by: the data by its manifest, all else by stage key."""
    return {
        role: done.result["manifest"] if role == "data" else done.key
        for role, done in inputs.items()
    }

"""What each stage of the pipeline is and does; the flows put them in order."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cluster import cores, start_ray
from pipelines.launch import choose_weights, search_weights, train_stage
from pipelines.points import PointLog
from pipelines.preparing import data_set, data_uri, prepare_into_store, prepare_stage
from pipelines.run import Done, Job, Run
from pipelines.stage import Stage
from pipelines.worker import StageOrder
from sdn.config import LossWeights, to_dict

if TYPE_CHECKING:
    from pipelines.settings import Settings
    from sdn.config import RunConfig, StageConfig


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


def check_splits(config: RunConfig, data: Done) -> None:
    """Refuse data on which a later stage would fail, before anything is trained.

    Raises:
        ValueError: no test split, or no validation split where trials are to be ranked on it.
    """
    samples = data.result["samples"]
    found = ", ".join(f"{split} {count}" for split, count in samples.items())
    if not samples.get("test"):
        raise ValueError(
            f"the data set has no test images to evaluate on ({found}): raise data.test_share, add "
            "images, or put some into a folder named test"
        )
    if config.search.trials > 1 and not samples.get("validation"):
        raise ValueError(
            f"the data set has no validation images to rank trials on ({found}): raise "
            "data.validation_share, put some images into a folder named validation, or search "
            "nothing with --set search.trials=0"
        )


def teacher(run: Run, data: Done) -> Job:
    """The frozen classifier: pretrained weights, or fitted on the training split's labels."""
    config = run.config.teacher
    inputs = {"data": data.result["manifest"]}
    if config.weights is not None and "://" not in config.weights:
        from sdn.teacher import file_digest

        path = Path(config.weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"teacher.weights: no file {path}")
        inputs["weights"] = file_digest(path)
    stage = Stage(name="teacher", config=to_dict(config), inputs=inputs)

    def work(folder: Path) -> dict[str, Any]:
        from sdn.fitting import write_teacher

        return write_teacher(
            folder,
            data_set(run, data),
            config,
            threads=cores(run.settings),
            report=lambda share, text: run.progress("teacher", share, text),
        )

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

        return write_captions(
            folder,
            data_set(run, data),
            run.store.fetch(taught.folder),
            run.config.captions,
            threads=cores(run.settings),
            report=lambda share, text: run.progress("captions", share, text),
        )

    return Job(stage=stage, work=work)


def possible_workers(config: RunConfig, stage: StageConfig, settings: Settings) -> int:
    """The recipe's workers, at most one a core of this machine; a cluster gets what it asks for."""
    if settings.ray_address is not None:
        return config.workers
    fitting = range(min(config.workers, cores(settings)), 0, -1)
    return next(n for n in fitting if config.lanes % n == 0 and stage.global_batch % n == 0)


def _distillation_stage(run: Run, name: str, stage: StageConfig, inputs: dict[str, str]) -> Stage:
    """Key of a stage of the student: its config, what shapes the student, and its inputs.

    The number of workers is no part of it: the samples and their order do not depend on it.
    """
    config = {
        "stage": to_dict(stage),
        "student": to_dict(run.config.student),
        "lanes": run.config.lanes,
    }
    return Stage(name=name, config=config, inputs=inputs)


def _order(
    run: Run, name: str, config: RunConfig, inputs: dict[str, Done], threads: int
) -> StageOrder:
    data = inputs["data"]
    return StageOrder(
        stage=name,
        config=to_dict(config),
        store=run.store.uri,
        cache=str(run.settings.cache.expanduser()),
        cache_gib=run.settings.cache_gib,
        endpoint=run.settings.s3_endpoint,
        data=data_uri(run, data),
        version=data.result["manifest"],
        inputs={role: done.folder for role, done in inputs.items() if role != "data"},
        threads=threads,
    )


def distil(run: Run, name: str, inputs: dict[str, Done], weights: LossWeights | None = None) -> Job:
    """Stage one or stage two of the student, on Ray Train.

    Args:
        run: the run.
        name: `stage_one` or `stage_two`.
        inputs: role -> finished stage: data, teacher, captions, and start for stage two.
        weights: in place of the recipe's.
    """
    config = run.config
    stage_config: StageConfig = getattr(config, name)
    if weights is not None:
        stage_config = dataclasses.replace(stage_config, weights=weights)
        changed: dict[str, Any] = {name: stage_config}
        config = dataclasses.replace(config, **changed)
    stage = _distillation_stage(run, name, stage_config, _keys(inputs))

    def work(folder: Path) -> dict[str, Any]:
        from sdn.stage_run import write_model

        count = possible_workers(config, stage_config, run.settings)
        threads = min(config.threads or cores(run.settings), max(1, cores(run.settings) // count))
        workers: list[dict[str, Any]] = []
        start_ray(run.settings)
        with PointLog(folder) as points:

            def listen(kind: str, values: dict[str, Any]) -> None:
                if kind == "step":
                    points.write(values)
                    run.progress(
                        name,
                        values["step"] / values["steps"],
                        f"loss {values['losses']['loss/total']:.3f}, "
                        f"{values['images_per_s']:.0f} images/s",
                    )
                else:
                    workers.append({"kind": kind, **values})

            last = train_stage(
                _order(run, name, config, inputs, threads),
                name=stage.short,
                workers=count,
                listen=listen,
            )
        student = last.average if last.average is not None else last.student
        write_model(folder, config, run.store.fetch(inputs["captions"].folder), student)
        return {
            "steps": last.step,
            "images_seen": last.images_seen,
            "precision": last.precision,
            "weights": to_dict(stage_config.weights),
            "workers": workers,
        }

    return Job(stage=stage, work=work)


def search(run: Run, inputs: dict[str, Done]) -> Job:
    """Short trials of stage two with other loss weights, ranked on validation captions."""
    config = run.config
    stage = _distillation_stage(run, "search", config.stage_two, _keys(inputs))
    stage = dataclasses.replace(stage, config=stage.config | {"search": to_dict(config.search)})

    def work(folder: Path) -> dict[str, Any]:
        if config.search.trials < 2:  # nothing to compare
            own = to_dict(config.stage_two.weights)
            return {"weights": own, "trials": [], "best": None}
        epochs = config.search.images / inputs["data"].result["samples"]["train"]
        short = dataclasses.replace(
            config, stage_two=dataclasses.replace(config.stage_two, epochs=epochs)
        )
        ended: list[dict[str, Any]] = []

        def listen(kind: str, values: dict[str, Any]) -> None:
            ended.append({"kind": kind, **values})
            run.progress(
                "search",
                len(ended) / config.search.trials,
                f"trial {len(ended)} of {config.search.trials}: score {values['score']}",
            )

        start_ray(run.settings)
        trials = search_weights(
            _order(run, "stage_two", short, inputs, threads=1),
            name=stage.short,
            config=config,
            settings=run.settings,
            listen=listen,
        )
        weights, best = choose_weights(trials, config.search.margin, config.stage_two.weights)
        (folder / "trials.json").write_text(json.dumps(trials, indent=2))
        return {"weights": to_dict(weights), "trials": trials, "best": best}

    return Job(stage=stage, work=work)


def evaluate(run: Run, inputs: dict[str, Done], models: dict[str, Done]) -> Job:
    """Scores, contact sheet and report on the test split."""
    stage = Stage(
        name="evaluate",
        config=to_dict(run.config.evaluation),
        inputs=_keys(inputs) | {name: done.key for name, done in models.items()},
    )

    def work(folder: Path) -> dict[str, Any]:
        from pipelines.report import write_evaluation

        return write_evaluation(run, folder, inputs, models, stage)

    return Job(stage=stage, work=work)


def _keys(inputs: dict[str, Done]) -> dict[str, str]:
    """What the inputs of a stage are known by: the data by its manifest, all else by stage key."""
    return {
        role: done.result["manifest"] if role == "data" else done.key
        for role, done in inputs.items()
    }

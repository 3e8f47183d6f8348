"""Loss weights against each other at full length: seeds, validation, and the test split once.

    python tests/benchmarks/loss_weights.py train --store RUNS --work DIR [--seeds 3] \\
        --weights ones='{"image": 1, "conv1": 1, ...}' --weights own=recipe [--processes 2]
    python tests/benchmarks/loss_weights.py score --store RUNS --work DIR --split validation|test

`--store` holds a finished `sdn run openmoji` (or `--recipe`): its data set, teacher, caption
encoder, reference and judge. Each seed has a stage one of its own, which all weights start from.
What is trained already is not trained again. One process a core, one thread each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch

from sdn.config import RunConfig, from_dict
from sdn.memory import keep_freed_memory
from sdn.recipes import recipe
from sdn.stage_run import StageInputs, run_stage, write_model

DONE = "trained.json"


def store_inputs(store: Path, config: RunConfig) -> tuple[StageInputs, dict[str, Path]]:
    """What a finished run left, the newest of each stage."""
    found = {}
    for role in ("prepare", "teacher", "captions", "reference", "judge"):
        folders = sorted((store / "stages").glob(f"{role}-*"), key=lambda f: f.stat().st_mtime)
        done = [folder for folder in folders if (folder / "done.json").is_file()]
        assert done, f"{store} has no finished {role}: sdn run {config.name} --store {store}"
        found[role] = done[-1]
    inputs = StageInputs(
        data=found["prepare"], teacher=found["teacher"], captions=found["captions"]
    )
    return inputs, found


def seeded(config: RunConfig, seed: int) -> RunConfig:
    return dataclasses.replace(
        config,
        stage_one=dataclasses.replace(config.stage_one, seed=seed),
        stage_two=dataclasses.replace(config.stage_two, seed=seed),
    )


def changed(config: RunConfig, change: dict[str, float]) -> RunConfig:
    """The recipe's stage two with these weights, and the rate where it is among them."""
    change = dict(change)
    stage = dataclasses.replace(config.stage_two, rate=change.pop("rate", config.stage_two.rate))
    weights = dataclasses.replace(stage.weights, **change)
    return dataclasses.replace(config, stage_two=dataclasses.replace(stage, weights=weights))


def train_one(task: tuple[str, dict[str, object], str, str, str | None]) -> str:
    """Train one stage into a model folder unless it is there."""
    name, values, folder, store, start = task
    place = Path(folder)
    if (place / DONE).is_file():
        return f"{place.name}: there"
    torch.set_num_threads(1)
    keep_freed_memory()
    config = from_dict(RunConfig, values)
    inputs, found = store_inputs(Path(store), config)
    inputs = dataclasses.replace(inputs, start=None if start is None else Path(start))
    began = time.monotonic()
    trainer = run_stage(name, config, inputs)
    place.mkdir(parents=True, exist_ok=True)
    weights = {key: value.cpu() for key, value in trainer.weights().items()}
    write_model(place, config, found["captions"], weights)
    seconds = time.monotonic() - began
    (place / DONE).write_text(json.dumps({"seconds": seconds, "images": trainer.images_seen}))
    return f"{place.name}: {trainer.images_seen:,} images in {seconds:.0f} s"


def train(args: argparse.Namespace, config: RunConfig) -> None:
    values = dataclasses.asdict
    ones, twos = [], []
    for seed in range(args.seeds):
        start = str(args.work / f"stage-one-{seed}")
        ones.append(("stage_one", values(seeded(config, seed)), start, str(args.store), None))
        for name, change in args.weights:
            here = changed(seeded(config, seed), change)
            place = str(args.work / f"{name}-{seed}")
            twos.append(("stage_two", values(here), place, str(args.store), start))
    context = multiprocessing.get_context("spawn")
    for tasks in (ones, twos):
        with context.Pool(args.processes, maxtasksperchild=1) as pool:
            for said in pool.imap_unordered(train_one, tasks, chunksize=1):
                print(said, flush=True)


def score(args: argparse.Namespace, config: RunConfig) -> None:
    from sdn.sampling import open_synthesizer

    _, found = store_inputs(args.store, config)
    folders = sorted(f for f in args.work.iterdir() if (f / DONE).is_file())
    rows: dict[str, dict[str, list[dict[str, float]]]] = {}
    scorer = scores_on_test if args.split == "test" else scores_on_validation
    for folder, scores in scorer(config, found, folders, open_synthesizer):
        name, _, _ = folder.name.rpartition("-")
        for score_name, value in scores.items():
            rows.setdefault(name, {}).setdefault(score_name, []).append(value)
            if not args.json:
                interval = f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
                print(f"{folder.name:24} {score_name:32} {interval}", flush=True)
    for name, scores in rows.items():
        for score_name, values in scores.items():
            plain = [value["value"] for value in values]
            mean, spread = statistics.fmean(plain), of_seeds(plain)
            if not args.json:
                told = f"{mean:.4f} ({mean - spread:.4f} to {mean + spread:.4f})"
                print(f"{name:24} {score_name:32} {told} mean of {len(plain)} seeds")
    if args.json:
        print(json.dumps(rows))


def of_seeds(values: list[float]) -> float:
    """Half of the 95% interval of the mean over seeds (Student's t)."""
    from scipy.stats import t

    if len(values) < 2:
        return float("nan")
    error = statistics.stdev(values) / len(values) ** 0.5
    return float(t.ppf(0.975, len(values) - 1)) * error


def scores_on_validation(config, found, folders, open_model):
    from sdn.validation import Validation

    inputs = StageInputs(
        data=found["prepare"], teacher=found["teacher"], captions=found["captions"]
    )
    kinds = {}
    for kind in ("kid", "retrieval"):
        search = dataclasses.replace(config.search, score=kind)
        here = dataclasses.replace(config, search=search)
        kinds[kind] = Validation(here, inputs, found["reference"])
    for folder in folders:
        weights = open_model(folder).student.state_dict()
        yield folder, {kind: vars_of(one(weights).score) for kind, one in kinds.items()}


def vars_of(found):
    return {"value": found.value, "low": found.low, "high": found.high}


def scores_on_test(config, found, folders, open_model):
    from sdn.data.dataset import open_dataset
    from sdn.draws import plan_draws
    from sdn.evaluation import drawn_blocks, open_evaluator
    from sdn.features.networks import open_network

    dataset = open_dataset(found["prepare"])
    draws = plan_draws(dataset, config.evaluation)
    network = open_network(config.evaluation, found["teacher"])
    with tempfile.TemporaryDirectory() as scratch:
        evaluator = open_evaluator(config.evaluation, dataset, draws, network, found, Path(scratch))
        for folder in folders:
            drawn = evaluator.score(folder.name, drawn_blocks(open_model(folder), draws))
            kept = (
                "kid_error", "r_precision_score", "pixels/top1_score",
                "pixels/reciprocal_rank_score", "features/top1_score",
            )  # fmt: skip
            yield folder, {name: drawn.scores[name] for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "score"))
    parser.add_argument("--recipe", default="openmoji")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--epochs", type=float, help="of stage two; the recipe's by default")
    parser.add_argument(
        "--weights", action="append", default=[], help="NAME=JSON, or NAME=recipe; may be repeated"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = recipe(args.recipe)
    if args.epochs is not None:
        stage = dataclasses.replace(config.stage_two, epochs=args.epochs)
        config = dataclasses.replace(config, stage_two=stage)
    args.weights = [
        (name, {} if text == "recipe" else json.loads(text))
        for name, _, text in (found.partition("=") for found in args.weights)
    ]
    {"train": train, "score": score}[args.what](args, config)


if __name__ == "__main__":
    main()

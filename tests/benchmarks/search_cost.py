"""What Ray Tune costs over running the same trials by hand.

    python tests/benchmarks/search_cost.py --store RUNS [--trials 6] [--images 9600] [--cores 2]

`--store` holds a finished `sdn run openmoji`. The trials are the first ones of the recipe's search,
all to their end (no scheduler). By hand: one process a core with one thread each, which runs its
share of the trials one after another; beside it, one process with all cores and one trial after
another. Under Tune: as the pipeline does it, the start of Ray and of its workers included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import torch
from loss_weights import store_inputs

from pipelines.suggesting import suggestion
from sdn.config import RunConfig, from_dict, to_dict
from sdn.recipes import recipe
from sdn.space import with_values


def by_hand(task: tuple[dict[str, object], str, list[int], int]) -> dict[int, float]:
    """Run trials one after another in this process; number -> score."""
    from sdn.memory import keep_freed_memory
    from sdn.trial import run_trial
    from sdn.validation import Validation

    values, store, numbers, threads = task
    torch.set_num_threads(threads)
    keep_freed_memory()
    config = from_dict(RunConfig, values)
    inputs, found = store_inputs(Path(store), config)
    inputs = dataclasses.replace(inputs, start=_start(Path(store)))
    validation = Validation(config, inputs, found["reference"])
    scores = {}
    for number in numbers:
        changed = with_values(config, suggestion(config, [], number))

        def reached(point, number=number):
            scores[number] = validation(point.weights()).score.value

        run_trial(changed, inputs, reached)
    return scores


def _start(store: Path) -> Path:
    done = [f for f in (store / "stages").glob("stage_one-*") if (f / "done.json").is_file()]
    return max(done, key=lambda folder: folder.stat().st_mtime)


def under_tune(config: RunConfig, store: Path, cores: int, place: Path) -> dict[int, float]:
    from pipelines.cluster import start_ray, stop_ray
    from pipelines.launch import run_trials
    from pipelines.settings import Settings
    from pipelines.trials import TrialLedger
    from pipelines.worker import StageOrder
    from sdn.data.dataset import open_dataset

    _, found = store_inputs(store, config)
    settings = Settings(store=str(place), cpus=cores)
    inputs = {role: f"stages/{found[role].name}" for role in ("teacher", "captions", "reference")}
    inputs["start"] = f"stages/{_start(store).name}"
    (place / "stages").symlink_to(store / "stages")
    order = StageOrder(
        stage="stage_two", name="search-cost", config=to_dict(config), store=str(place),
        cache=str(place / "cache"), cache_gib=1.0, endpoint=None, data=str(found["prepare"]),
        version=open_dataset(found["prepare"]).manifest.digest, inputs=inputs, threads=1,
        workers=(1, 1), stall_s=300, grace_s=20,
    )  # fmt: skip
    start_ray(settings)
    try:
        ledger = TrialLedger(order.place())
        run_trials(order, ledger, config=config, settings=settings, listen=lambda trial: None)
    finally:
        stop_ray()
    return {trial.number: trial.value for trial in ledger.all()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--images", type=int, default=9_600)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = recipe("openmoji")
    search = dataclasses.replace(
        config.search,
        trials=args.trials,
        images=args.images,
        scheduler="none",
        random_trials=args.trials,
    )
    config = dataclasses.replace(config, search=search)
    values, store = to_dict(config), args.store.resolve()
    context = multiprocessing.get_context("spawn")
    numbers = list(range(args.trials))
    found, scores = {}, {}

    def timed(name, work):
        began = time.monotonic()
        scores[name] = work()
        found[name] = time.monotonic() - began
        print(f"{name:28} {found[name]:7.1f} s", flush=True)

    def shared(parts, threads):
        with context.Pool(len(parts)) as pool:
            tasks = [(values, str(store), part, threads) for part in parts]
            return {n: v for one in pool.map(by_hand, tasks, chunksize=1) for n, v in one.items()}

    place = Path(tempfile.mkdtemp(prefix="search-cost-"))
    try:
        timed("tune", lambda: under_tune(config, store, args.cores, place))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    parts = [numbers[k :: args.cores] for k in range(args.cores)]
    timed("by hand, one a core", lambda: shared(parts, 1))
    timed("by hand, one after another", lambda: shared([numbers], args.cores))
    for name in list(found)[1:]:
        print(f"tune over {name}: {found['tune'] / found[name] - 1:+.1%}")
    same = scores["tune"] == scores["by hand, one a core"]
    print(f"scores of tune and by hand are {'the same' if same else 'not the same'}")
    if args.json:
        print(json.dumps({"seconds": found, "scores": scores}))


if __name__ == "__main__":
    main()

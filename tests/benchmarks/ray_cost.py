"""What Ray costs a stage: `python tests/benchmarks/ray_cost.py [--json] [--workers 1 2]`.

The same training (the embedded recipe's networks, random images) by `sdn` alone in one process and
by Ray Train on the same cores, in turns: steady images a second (median over the reports, the first
left out), seconds until the first step, and CPU threads of each rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "chaos")]

ALONE = """
import json, sys, time
import torch
from pathlib import Path
from pipelines.worker import StageOrder
from sdn.memory import keep_freed_memory
from sdn.running import run_recorded
values = json.loads(Path(sys.argv[1]).read_text())
order = StageOrder(**{**values, "workers": tuple(values["workers"])})
torch.set_num_threads(order.threads)
keep_freed_memory()
tell = lambda step: print(step.images_per_s, flush=True)
run_recorded(order.opener(), order.place(), report=tell)
"""


def write_store(folder: Path, epochs: float) -> dict[str, object]:
    """A store with data, a random teacher and an untrained encoder; the config of the run."""
    import numpy as np
    import tiny_data
    import torch

    from pipelines.store import LocalStore
    from sdn.captions import new_encoder, save_encoder
    from sdn.config import to_dict
    from sdn.data.images import encode
    from sdn.recipes import recipe
    from sdn.sampling import ENCODER
    from sdn.stage_run import TAP_MEANS, TEACHER
    from sdn.teacher import empty_teacher, save_teacher

    config = recipe("openmoji")
    stage = dataclasses.replace(config.stage_two, epochs=epochs)
    config = dataclasses.replace(config, stage_two=stage)
    store = LocalStore(folder)
    noise = np.random.default_rng(0)
    items = [
        tiny_data.record(
            n, image=encode(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8), "png")
        )
        for n in range(640)
    ]
    data = dataclasses.replace(config.data, source="tiny")
    tiny_data.write(store.workspace("data"), items, data)
    store.publish("data", {})
    torch.manual_seed(0)
    teacher = empty_teacher(config.teacher)
    for conv in teacher.convs.values():
        torch.nn.init.kaiming_normal_(conv.weight)
    save_teacher(teacher, store.workspace("teacher") / TEACHER)
    means = json.dumps(dict.fromkeys(teacher.names, 0.5))
    (folder / "teacher" / TAP_MEANS).write_text(means)
    store.publish("teacher", {})
    save_encoder(new_encoder(config.captions), store.workspace("captions") / ENCODER)
    store.publish("captions", {})
    return to_dict(config)


def measure(kind: str, folder: Path, config: dict[str, object], workers: int, cores: int) -> dict:
    """Steady rate, and seconds until the first report."""
    import training_place

    order = dataclasses.replace(
        training_place.order_of(folder, f"{kind}-{workers}-{time.time_ns()}", workers),
        stage="stage_two",
        config=config,
        threads=max(1, cores // workers),
    )
    path = folder / f"{order.name}.json"
    path.write_text(json.dumps(dataclasses.asdict(order)))
    began, rates, first = time.perf_counter(), [], None
    program = ["-c", ALONE] if kind == "alone" else ["-m", "training_place"]
    env = os.environ | {"SDN_CPUS": str(cores), "PYTHONPATH": ":".join([str(ROOT), *sys.path[:2]])}
    with subprocess.Popen(
        [sys.executable, *program, str(path)],
        stdout=subprocess.PIPE, stderr=None, text=True, env=env,
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            if kind == "alone":
                rate = float(line)
            else:
                said, values = json.loads(line)
                if said != "step":
                    continue
                rate = values["images_per_s"]
            first = time.perf_counter() - began if first is None else first
            rates.append(rate)
    assert process.returncode == 0, f"{kind} failed"
    return {"images_per_s": statistics.median(rates[1:]), "first_report_s": first}


def main() -> None:
    """Print a line for each pair of runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=5)
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        config = write_store(Path(place), chosen.epochs)
        for workers in chosen.workers:
            shares = []
            for _ in range(chosen.rounds):
                alone = measure("alone", Path(place), config, 1, chosen.cores)
                ray = measure("ray", Path(place), config, workers, chosen.cores)
                share = ray["images_per_s"] / alone["images_per_s"]
                shares.append(share)
                rows.append({"workers": workers, "alone": alone, "ray": ray, "share": share})
                print(
                    f"{workers} worker(s) on {chosen.cores} cores: {ray['images_per_s']:.0f} "
                    f"images/s, sdn alone {alone['images_per_s']:.0f}, share {share:.1%}; first "
                    f"report after {ray['first_report_s']:.1f} and {alone['first_report_s']:.1f} s",
                    file=sys.stderr if chosen.json else sys.stdout,
                    flush=True,
                )
            print(
                f"{workers} worker(s): median share {statistics.median(shares):.1%}",
                file=sys.stderr if chosen.json else sys.stdout,
                flush=True,
            )
    if chosen.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()

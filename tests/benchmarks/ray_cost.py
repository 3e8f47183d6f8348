"""What Ray costs a stage: `python tests/benchmarks/ray_cost.py [--json] [--workers 1 2]`.

The same training (the embedded recipe's networks, random images) by `sdn` alone in one process and
by Ray Train on the same cores. Both run at the same time in turns of some seconds, one frozen while
the other goes on, so that a machine whose speed changes from minute to minute changes it for both.
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
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

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


class Running:
    """A training that goes on until it is ended, and can be frozen with all its processes."""

    def __init__(self, kind: str, folder: Path, config: dict, workers: int, cores: int) -> None:
        import training_place

        order = dataclasses.replace(
            training_place.order_of(folder, f"{kind}-{workers}", workers),
            stage="stage_two",
            config=config,
            threads=max(1, cores // workers),
        )
        path = folder / f"{order.name}.json"
        path.write_text(json.dumps(dataclasses.asdict(order)))
        self._log = (folder / f"{order.name}.log").open("w")
        program = ["-c", ALONE] if kind == "alone" else ["-m", "training_place"]
        paths = ":".join([str(ROOT), *sys.path[:2]])
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, *program, str(path)],
            stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | {"SDN_CPUS": str(cores), "PYTHONPATH": paths},
        )  # fmt: skip
        self.rates: list[float] = []
        threading.Thread(target=self._read, args=(kind,), daemon=True).start()
        while not self.rates:
            assert self._process.poll() is None, Path(self._log.name).read_text()[-2000:]
            time.sleep(0.01)
        self.first_report_s = time.perf_counter() - began
        """Seconds until the first report."""

    def _read(self, kind: str) -> None:
        for line in self._process.stdout or ():
            if kind == "alone":
                self.rates.append(float(line))
                continue
            said, values = json.loads(line)
            if said == "step":
                self.rates.append(values["images_per_s"])

    def window(self, seconds: float) -> list[float]:
        """The rates reported in so many seconds; the first spans the time before, and is left."""
        self._send("resume")
        known = len(self.rates)
        time.sleep(seconds)
        found = self.rates[known + 1 :]
        self._send("suspend")
        return found

    def freeze(self) -> None:
        """All its processes stand still."""
        self._send("suspend")

    def end(self) -> None:
        """Kill all its processes."""
        self._send("kill")
        self._process.wait()
        self._log.close()

    def _send(self, what: str) -> None:
        own = psutil.Process(self._process.pid)
        for process in [*own.children(recursive=True), own]:
            with suppress(psutil.NoSuchProcess):
                getattr(process, what)()


def measure(workers: int, chosen: argparse.Namespace) -> dict[str, object]:
    """Rates of both, in turns of some seconds: what the machine does meanwhile meets both."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as ends:
        folder = Path(place)
        config = write_store(folder, epochs=1e5)
        alone = Running("alone", folder, config, 1, chosen.cores)
        ends.callback(alone.end)
        alone.freeze()
        ray = Running("ray", folder, config, workers, chosen.cores)
        ends.callback(ray.end)
        ray.freeze()
        shares = []
        for turn in range(chosen.turns + 1):
            here, there = (statistics.mean(one.window(chosen.seconds)) for one in (alone, ray))
            if turn == 0:  # warm-up
                continue
            shares.append(there / here)
            print(
                f"{workers} worker(s) on {chosen.cores} cores: {there:.0f} images/s, sdn alone "
                f"{here:.0f}, share {shares[-1]:.1%}",
                file=sys.stderr,
                flush=True,
            )
    return {
        "workers": workers,
        "share": statistics.median(shares),
        "shares": shares,
        "first_report_s": {"alone": alone.first_report_s, "ray": ray.first_report_s},
    }


def main() -> None:
    """Print a line for each pair of turns, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=12)
    chosen = parser.parse_args()
    rows = [measure(workers, chosen) for workers in chosen.workers]
    if chosen.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        first = row["first_report_s"]
        print(
            f"{row['workers']} worker(s): share {row['share']:.1%} (median of {chosen.turns} "
            f"turns); first report after {first['ray']:.1f} s, alone {first['alone']:.1f} s"
        )


if __name__ == "__main__":
    main()

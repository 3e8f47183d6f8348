"""A flow's process that follows a training on a cluster, as `pipelines.jobs` does it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOW = """
import json, sys
from pathlib import Path
from pipelines.jobs import train_as_job
from pipelines.worker import StageOrder
values = json.loads(Path(sys.argv[1]).read_text())
order = StageOrder(**{**values, "workers": tuple(values["workers"])})
say = lambda kind, values: print(json.dumps([kind, values]), flush=True)
last = train_as_job(order, sys.argv[2], listen=say)
print(json.dumps(["done", {"step": last.step}]), flush=True)
"""


class Flow:
    """A process that follows a job, and what it heard."""

    def __init__(self, order, address, folder):
        path = folder / f"{order.name}.json"
        path.write_text(json.dumps(vars(order)))
        self.log = folder / f"{order.name}.log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", FLOW, str(path), address],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=self.log.open("a"), text=True,
        )  # fmt: skip
        self.heard = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self.heard.append(json.loads(line))

    def wait(self, kind, seconds=120):
        until = time.monotonic() + seconds
        while not any(heard == kind for heard, _ in self.heard):
            assert self.process.poll() is None or kind == "done", self.log.read_text()[-2000:]
            assert time.monotonic() < until, (kind, self.heard, self.log.read_text()[-2000:])
            time.sleep(0.1)
        return [values for heard, values in self.heard if heard == kind]

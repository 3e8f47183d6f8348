"""Runs inside Ray Train: wraps `sdn.running` for its ranks. No Prefect, no MLflow."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from pipelines.store import open_files, open_store
from sdn.config import RunConfig, from_dict
from sdn.data.dataset import open_dataset
from sdn.memory import keep_freed_memory
from sdn.ranks import of_process_group
from sdn.running import run_recorded
from sdn.stage_run import StageInputs, open_stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdn.data.dataset import DataSet
    from sdn.data.files import Files
    from sdn.running import Opener

    Say = Callable[[str, dict[str, Any]], None]

ASKED = threading.Event()
"""Set in a rank's process by SIGTERM: checkpoint, then stop."""
_BEAT_S = 1.0
_OPENING_S = 10.0


@dataclass(frozen=True, kw_only=True)
class StageOrder:
    """All that a worker on any node needs to know; plain values only."""

    stage: str
    """teacher, captions, or a stage of the student."""
    name: str
    """The stage's short key: Ray's run name, and the name of the training's place."""
    config: dict[str, Any]
    store: str
    cache: str
    cache_gib: float
    """Limit of the blocks read from S3, in GiB."""
    endpoint: str | None
    data: str
    """Place of the data set."""
    version: str
    """Digest of the version of it that is read, whatever has come since."""
    inputs: dict[str, str]
    """Role of `StageInputs`, the data set apart -> folder in the store."""
    threads: int
    """CPU threads of a rank."""
    workers: tuple[int, int]
    """Fewest and most ranks."""
    stall_s: float
    """Without progress for so long, a rank is taken for hung."""
    grace_s: float
    """What a stopped training may take for its last checkpoint."""

    def run_config(self) -> RunConfig:
        """The resolved config of the run."""
        return from_dict(RunConfig, self.config)

    def place(self) -> Files:
        """Where the training writes down all that it must not lose."""
        uri = f"{self.store}/training/{self.name}"
        return open_files(uri, Path(self.cache), self.endpoint, self.cache_gib)

    def dataset(self) -> DataSet:
        """The data set where it lies."""
        files = open_files(self.data, Path(self.cache), self.endpoint, self.cache_gib)
        return open_dataset(files, self.version)

    def fetch(self) -> StageInputs:
        """The inputs of a distillation stage."""
        return StageInputs(data=self.dataset(), **self.folders())

    def folders(self) -> dict[str, Path]:
        """The inputs beside the data set, as local folders of this node."""
        store = open_store(self.store, Path(self.cache), self.endpoint)
        return {role: store.fetch(name) for role, name in self.inputs.items()}

    def files(self, below: str) -> Files:
        """A folder below the training's place."""
        uri = f"{self.store}/training/{self.name}/{below}"
        return open_files(uri, Path(self.cache), self.endpoint, self.cache_gib)

    def opener(self, report: Callable[[float, str], None] = lambda share, text: None) -> Opener:
        """What opens this stage's training; `report` is told (share, text) where that is long."""
        from sdn.fitting import open_caption_fit, open_teacher_fit

        config = self.run_config()
        if self.stage == "teacher":
            return partial(open_teacher_fit, config.teacher, self.dataset())
        if self.stage == "captions":
            teacher = self.folders()["teacher"]
            return partial(
                open_caption_fit, config.captions, self.dataset(), teacher, report=report
            )
        return partial(open_stage, self.stage, config, self.fetch())  # type: ignore[arg-type]


def train_rank(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker.

    Args:
        settings: `order` (fields of a StageOrder) and `points`, the queue to the driver.
    """
    import ray
    from ray.train.torch import get_device

    order = StageOrder(**settings["order"])
    torch.set_num_threads(order.threads)
    keep_freed_memory()
    config = order.run_config()
    stage = getattr(config, order.stage)
    rank = of_process_group(get_device(), compress=getattr(stage, "compress", "none"))
    say = _speaker(settings["points"], settings["attempt"])
    stacks = stack_file(os.getpid())
    say(
        "worker",
        {
            "rank": rank.rank,
            "world": rank.world,
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "device": str(rank.device),
            "threads": order.threads,
        },
    )

    began = time.monotonic()
    with _Alive(rank.rank, say, order.stall_s, stacks) as alive:
        _, ended = run_recorded(
            order.opener(_opening(say) if rank.rank == 0 else lambda share, text: None),
            order.place(),
            rank=rank,
            report=lambda step: say("step", dataclasses.asdict(step)),
            alive=alive,
            stopping=lambda: ASKED.is_set() or _preempted(),
            say=lambda text: say("said", {"text": text}),
            sheet=_sheet(order) if rank.rank == 0 and order.stage.startswith("stage") else None,
        )
    if rank.rank == 0:
        say("computed", {"seconds": time.monotonic() - began, "ended": ended})


def catch_sigterm() -> None:
    """From now on SIGTERM asks this rank to stop; called in the main thread of its process."""
    ASKED.clear()
    signal.signal(signal.SIGTERM, lambda number, frame: ASKED.set())


def _preempted() -> bool:
    """Whether this rank's node is about to be taken away.

    Read where Ray's watcher notes it: the public function asks rank 0 through the controller, at
    every step, and hangs where one rank does not ask.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def stack_file(pid: int) -> Path:
    """Where a rank that makes no progress leaves the stacks of its threads, on its node."""
    return Path(tempfile.gettempdir()) / f"sdn-stacks-{os.getuid()}-{pid}.txt"


class _Alive:
    """Tells the driver of progress, and dumps all stacks where there is none for too long."""

    def __init__(self, rank: int, say: Say, stall_s: float, stacks: Path) -> None:
        self._rank, self._say, self._stall_s, self._path = rank, say, stall_s, stacks
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._file = self._path.open("w")
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __call__(self, step: int) -> None:
        """A step has been done."""
        now = time.monotonic()
        if now - self._told < _BEAT_S:
            return
        self._told = now
        self._say("alive", {"rank": self._rank, "step": step})
        # A little before the driver gives up, so that it finds the stacks. By a thread of C: it
        # writes while the interpreter waits in a collective.
        faulthandler.dump_traceback_later(max(1.0, 0.8 * self._stall_s), file=self._file)


def _opening(say: Say) -> Callable[[float, str], None]:
    """Tells the driver now and then how far the opening of a training is."""
    told = time.monotonic()

    def report(share: float, text: str) -> None:
        nonlocal told
        if share == 1 or time.monotonic() - told > _OPENING_S:
            told = time.monotonic()
            say("opening", {"text": text})

    return report


def _sheet(order: StageOrder) -> Any:
    from sdn.progress_sheet import sheet_of

    return sheet_of(order.run_config(), order.fetch())


def _speaker(points: Any, attempt: str) -> Say:
    """Send to the driver without ever waiting for it: its absence must not stop training."""
    from ray.exceptions import RayError

    def say(kind: str, values: dict[str, Any]) -> None:
        try:
            points.actor.put_nowait.remote((attempt, kind, values))
        except RayError:
            return

    return say

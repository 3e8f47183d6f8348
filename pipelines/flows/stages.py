"""How a flow does a stage: once for each key, tracked, with its progress shown."""

from __future__ import annotations

import contextvars
import dataclasses
import threading
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from pipelines.leaving_out import never_raising
from pipelines.left_locks import locks_given_back
from pipelines.masking import masked_errors
from pipelines.run import STARTING, Done, Job, Run, perform
from pipelines.search_pictures import PICTURES
from pipelines.search_tables import search_rows, told
from pipelines.trials import TrialLedger
from pipelines.weights_from import SEARCH_TAG, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from uuid import UUID

    from pipelines.stage import Stage
    from pipelines.tracking import Tracker
    from sdn.data.files import Files

terminal: ContextVar[Callable[[str, float, str], None] | None] = ContextVar(
    "terminal", default=None
)
"""Where the command line wants to see progress; None in a worker."""

_SYNC_EVERY_S = 5.0


def do(run: Run, job: Job, tracked: Tracked | None = None) -> Done:
    """Do a stage as a Prefect task whose cache key is the stage's key.

    The store alone decides whether the work is done and what its result is: Prefect's cache is
    shared by all stores of a machine, and only spares it the task.
    """
    stage = job.stage
    done_before = run.store.done(stage.folder) is not None

    @task(
        name=stage.name,
        task_run_name=stage.short,
        cache_key_fn=lambda *_: stage.key,
        refresh_cache=not done_before,
        persist_result=True,
    )
    @masked_errors()
    @locks_given_back()
    def work(key: str) -> Done:
        get_run_logger().info("stage %s, key %s", stage.name, key)
        return perform(run, job)

    live: AbstractContextManager[None] = nullcontext()
    if tracked is not None and not done_before:
        live = tracked.mirroring(job, training_place(run, stage))
    if not done_before:
        run.progress(stage.name, 0.0, STARTING)
    with live:
        done = work(stage.key)
    if done_before:
        done = perform(run, job)
    else:
        run.progress(stage.name, 1.0, "")
    if tracked is not None:
        tracked.finished(done, training_place(run, stage), lambda: run.store.fetch(done.folder))
    return done


def training_place(run: Run, stage: Stage) -> Files:
    """Where the training of a stage writes its points and sheets."""
    return run.store.files(f"training/{stage.short}")


class Tracked:
    """Mirrors stages into MLflow as nested runs of one parent.

    Args:
        tracker: of the recipe.
        name: of the parent run.
        key: of the parent run.
    """

    def __init__(self, tracker: Tracker, name: str, key: str) -> None:
        self.tracker = tracker
        self._parent_name, self._parent_key = name, key
        self._parent: str | None = None
        self.described = False
        """Whether the parent run has its config and its data."""

    @property
    def parent(self) -> str:
        """Id of the parent run; where MLflow did not answer at one use, the next one asks again.

        Raises:
            MlflowException: it does not answer.
        """
        if self._parent is None:
            self._parent = self.tracker.run(self._parent_name, self._parent_key)
        return self._parent

    @contextmanager
    def failing(self) -> Iterator[None]:
        """What ends the chain is shown in the parent run too."""
        try:
            yield
        except BaseException:
            with never_raising("end of the run"):
                self.tracker.finish(self.parent, "FAILED")
            raise

    @contextmanager
    def mirroring(self, job: Job, place: Files) -> Iterator[None]:
        """While the stage works, its points go to MLflow every few seconds."""
        over = threading.Event()
        said: set[int] = set()

        def mirror() -> None:
            while not over.wait(_SYNC_EVERY_S):
                with never_raising(f"points of {job.stage.name}"):
                    run = self._run(job.stage.name, job.stage.key)
                    self.tracker.points(run, place)
                    self.tracker.sheets(run, place)
                    if job.stage.name == "search":
                        for trial in TrialLedger(place, besides=said).all():
                            if trial.ended:
                                self._trial(run, job.stage.key, dataclasses.asdict(trial))
                                said.add(trial.number)

        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(mirror,), name="mlflow", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            with never_raising(f"end of {job.stage.name}"):
                self.tracker.finish(self._run(job.stage.name, job.stage.key), "FAILED")
            raise
        finally:
            over.set()
            thread.join(timeout=15)  # a server that hangs is not waited for

    def finished(self, done: Done, place: Files, folder: Callable[[], Path] | None = None) -> None:
        """A nested run of a finished stage, once: points, numbers of its result, its trials.

        Also for a stage of an earlier run, whose tracking server may not have answered then.
        """
        with never_raising(f"run of {done.name}"):
            run = self._run(done.name, done.key)
            # A search may be nested in the run of an earlier pipeline.
            if done.name == "search" and done.result["trials"]:
                self.tracker.log(self.parent, tags={SEARCH_TAG: run})
            if self.tracker.finished(run):
                return
            self.tracker.points(run, place)
            self.tracker.sheets(run, place)
            self.tracker.log(
                run,
                metrics={"seconds": done.seconds} | _numbers(done.result),
                tags={"sdn.folder": done.folder},
            )
            for trial in done.result.get("trials", []):
                self._trial(run, done.key, trial)
            if done.result.get("trials") and folder is not None:
                self._search_files(run, done, folder())
            self.tracker.finish(run)

    def _trial(self, parent: str, key: str, trial: dict[str, Any]) -> None:
        """A nested run of a trial that has ended; said again it changes nothing."""
        number = trial["number"]
        run = self.tracker.run(f"trial {number}", f"{key}-{number}", parent)
        full = trial.get("full", {})
        metrics = {f"full/{n}": full[n] for n in ("value", "p_value") if n in full}
        if "p_value" in trial:
            metrics["p_value"] = trial["p_value"]
        tags = {"sdn.state": trial["state"]}
        if trial["reason"]:
            tags["sdn.reason"] = trial["reason"][:5000]
        self.tracker.log(run, params=trial["values"], metrics=metrics, tags=tags)
        self.tracker.rungs(run, trial["points"])
        states = {"failed": "FAILED", "stopped": "KILLED"}
        self.tracker.finish(run, states.get(trial["state"], "FINISHED"))

    def _search_files(self, run: str, done: Done, folder: Path) -> None:
        """Weights, trials and pictures of a search, as artifacts of its run."""
        self.tracker.table(run, search_rows(done.result), "trials.json")
        self.tracker.text(run, told(done.result), "choice.txt")
        self.tracker.file(run, folder / WEIGHTS)
        for path in sorted((folder / PICTURES).iterdir()):
            self.tracker.file(run, path, PICTURES)

    def _run(self, name: str, key: str) -> str:
        return self.tracker.run(name, key, self.parent)


def _numbers(result: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers of a nested result under names that MLflow takes."""
    found: dict[str, float] = {}
    for key, value in result.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= _numbers(value, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found["".join(c if c.isalnum() or c in "_-./ " else "-" for c in name)] = float(value)
    return found


class Progress:
    """Progress of stages: in the terminal that started the flow, and as Prefect artifacts."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[UUID, float]] = {}

    def __call__(self, stage: str, share: float, text: str) -> None:
        """See `pipelines.run.Run.progress`."""
        show = terminal.get()
        if show is not None:
            show(stage, share, text)
        now = time.monotonic()
        artifact, last = self._shown.get(stage, (None, 0.0))
        if artifact is not None and now - last < _SYNC_EVERY_S and share < 1:
            return
        with never_raising("Prefect's progress"):
            if artifact is None:
                key = f"progress-{stage.replace('_', '-')}"
                made = create_progress_artifact(100 * share, key=key, description=text)
                artifact = cast("UUID", made)  # a coroutine only where it is awaited
            elif text:
                update_progress_artifact(artifact, 100 * share, description=text)
            else:
                update_progress_artifact(artifact, 100 * share)
            self._shown[stage] = (artifact, now)

"""Sees a stage's training through to its end, whatever happens to ranks, nodes and servers.

Ray Train makes one attempt at a time. What fails is judged here: an error that would come again is
raised at once, anything else is tried again from the newest whole checkpoint, as long as each few
attempts come further than the ones before.
"""

from __future__ import annotations

import contextvars
import dataclasses
import gc
import json
import logging
import signal
import threading
import time
import uuid
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

from pipelines.cluster import free_reserved, has_gpu, reports, started_here
from pipelines.hanging import end_ranks, stacks_of
from pipelines.left_locks import locks_given_back
from pipelines.reasons import TrainingError, final, reason
from pipelines.worker import StageOrder, catch_sigterm, train_rank
from sdn.checkpoint import Checkpoint, Checkpoints
from sdn.running import refuse_known_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Listen = Callable[[str, dict[str, Any]], None]

logger = logging.getLogger(__name__)
MAX_FAILURES = 3
"""Attempts in a row that may fail without a new checkpoint between them."""
_OVER = "over"
"""Kind of the last item in the queue from the workers."""
_LOOK_EVERY_S = 0.5
_FIRST_STEP = 3
"""Before its first step a rank may take this many times as long: inputs come, code is compiled."""


def finished(order: StageOrder) -> Checkpoint | None:
    """The last checkpoint of a training that is at its end; None before.

    Raises:
        KnownFailureError: it failed before in a way that would come again.
    """
    newest = _newest(order)
    return newest if newest is not None and newest.step == newest.steps else None


def _newest(order: StageOrder) -> Checkpoint | None:
    place = order.place()
    refuse_known_failure(place)
    return Checkpoints(place, say=logger.warning).newest()


def read_order(content: bytes) -> StageOrder:
    """The order that `write_order` has written."""
    values = json.loads(content)
    return StageOrder(**{**values, "workers": tuple(values["workers"])})


def write_order(order: StageOrder) -> bytes:
    """The order as JSON."""
    return json.dumps(dataclasses.asdict(order)).encode()


@locks_given_back()
def train_stage(order: StageOrder, *, listen: Listen) -> Checkpoint:
    """Run a stage's training with Ray Train; one that was interrupted goes on.

    Args:
        order: what to train.
        listen: receives ("worker" | "opening" | "step" | "said" | "failed", values) while it runs.

    Returns:
        The last checkpoint.

    Raises:
        TrainingError: it cannot be finished; the text carries the first reason.
        KnownFailureError: as `finished`.
    """
    failures, reached = 0, -1
    order.place().write("order.json", write_order(order))
    while (newest := _newest(order)) is None or newest.step < newest.steps:
        step = -1 if newest is None else newest.step
        if step > reached:
            failures, reached = 0, step
        del newest
        try:
            _attempt(order, listen)
        except TrainingError as error:
            failures += 1
            if error.final or failures > MAX_FAILURES:
                raise
            logger.warning("attempt failed and is repeated: %s", error)
            listen("failed", {"text": str(error), "failures": failures})
    return newest


def _attempt(order: StageOrder, listen: Listen) -> None:
    """One fit of Ray Train: to the end, or to where ranks were asked to stop."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    points = reports()
    least, most = order.workers
    trainer = _trainer_class()(
        train_rank,
        train_loop_config={
            "order": dataclasses.asdict(order),
            "points": points,
            "attempt": (attempt := uuid.uuid4().hex),
        },
        scaling_config=ScalingConfig(
            # The annotation knows nothing of the pair that an elastic group is given by.
            num_workers=cast("int", least if least == most else (least, most)),
            use_gpu=has_gpu(),
            resources_per_worker={"CPU": order.threads},
        ),
        run_config=RunConfig(
            name=order.name,
            storage_path=f"{order.store}/ray",
            failure_config=FailureConfig(max_failures=0),
            callbacks=[_catching_sigterm()],
        ),
    )
    watch = _Watch(order.stall_s)

    def hear(kind: str, values: dict[str, Any]) -> None:
        watch.heard(kind, values)
        if kind != "alive":
            listen(kind, values)

    try:
        with _listening(points, attempt, hear):
            _fit(trainer.fit, watch, order)
    finally:
        del trainer
        gc.collect()  # its controller's actors stay, and take their share of a core, until then
        if started_here():
            free_reserved()


class _Watch:
    """What is known of the ranks of an attempt."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._last, self._steps = time.monotonic(), 0
        self._stopping = False
        self.ranks: dict[int, dict[str, Any]] = {}

    def heard(self, kind: str, values: dict[str, Any]) -> None:
        """A rank has said something."""
        self._last = time.monotonic()
        if kind == "worker":
            if values["rank"] == 0:
                self._steps = 0
            # Of an elastic group that has shrunk, the ranks beyond its size are gone.
            left = {n: v for n, v in self.ranks.items() if n < values["world"]}
            self.ranks = left | {values["rank"]: values}  # a new one: others go through the old
            # Those that were asked may be gone, and this be of the group that takes their place.
            if self._stopping:
                end_ranks([values], signal.SIGTERM)
        elif kind in {"alive", "step"}:
            self._steps += 1

    def stop(self) -> bool:
        """Ask all ranks to stop, also those that begin from now on; False where none has begun."""
        self._stopping = True
        begun = self.ranks
        end_ranks(begun.values(), signal.SIGTERM)
        return bool(begun)

    def silent_s(self) -> float | None:
        """How long nothing was heard, if that is too long."""
        silent = time.monotonic() - self._last
        allowed = self._stall_s * (1 if self._steps else _FIRST_STEP)
        return silent if self.ranks and silent > allowed else None


def _fit(fit: Callable[[], Any], watch: _Watch, order: StageOrder) -> None:
    """Run `fit` in a thread, so that this one can watch, and be interrupted."""
    from ray.exceptions import RayError
    from ray.train.v2.api.exceptions import TrainingFailedError

    done: Future[None] = Future()

    def work() -> None:
        try:
            fit()
        except BaseException as error:  # noqa: BLE001 (handed on)
            done.set_exception(error)
        else:
            done.set_result(None)

    hung: str | None = None
    try:
        with locks_given_back():
            threading.Thread(target=work, name="fit", daemon=True).start()
            while not _over(done, _LOOK_EVERY_S):
                if hung is None and (silent := watch.silent_s()) is not None:
                    hung = f"no rank made progress for {silent:.0f} s (SDN_STALL_S)"
                    stacks = stacks_of(watch.ranks.values())
                    logger.error("%s; stacks of all ranks:\n%s", hung, stacks)
                    order.place().write(f"stacks-{int(time.time())}.txt", stacks.encode())
                    hung += f"; their stacks are in {order.place().uri}"
                    end_ranks(watch.ranks.values(), signal.SIGKILL)
    except BaseException:  # Ctrl-C, SIGTERM, a cancelled flow: one more checkpoint, then stop
        _stop(watch, done, order.grace_s)
        raise
    try:
        done.result()
    except (TrainingFailedError, RayError) as error:
        raise TrainingError(hung or reason(error), final=hung is None and final(error)) from error


def _over(done: Future[None], seconds: float) -> bool:
    with suppress(TimeoutError):
        done.exception(timeout=seconds)
        return True
    return False


def _stop(watch: _Watch, done: Future[None], grace_s: float) -> None:
    """Ask the ranks for a last checkpoint and wait for it; end those that take too long."""
    if not watch.stop():
        # They have nothing to write down, and end with Ray, as does `fit`, which is left in it.
        logger.warning(
            "stopped before the ranks began; the same command goes on from the newest checkpoint, "
            "if there is one"
        )
        return
    logger.warning("asked to stop: the ranks write a last checkpoint (at most %.0f s)", grace_s)
    if _over(done, grace_s):
        logger.warning("stopped; the same command goes on from the last checkpoint")
        return
    end_ranks(watch.ranks.values(), signal.SIGKILL)
    _over(done, 5.0)
    logger.warning("stopped without a last checkpoint: the ranks took too long (SDN_GRACE_S)")


def _trainer_class() -> Any:
    """Ray's TorchTrainer; on this machine alone it listens at loopback and has no needless helpers.

    Each actor of Ray Train takes two to three seconds of a core to start and a hundredth of one
    afterwards. One serves Ray's own data sets, which are not used; one gives back what a dead
    controller had reserved, as `free_reserved` does here; one hears what a group of fixed size
    needs, for an autoscaler.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    if not started_here():
        return TorchTrainer
    from pipelines.rendezvous import Loopback

    needless = (DatasetsCallback, PlacementGroupCleanerCallback)

    class Lean(TorchTrainer):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, torch_config=Loopback(), **settings)

        def _create_default_callbacks(self) -> list[Any]:
            found = super()._create_default_callbacks()  # type: ignore[misc]
            return [one for one in found if not isinstance(one, needless)]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            policy = settings["scaling_policy"]
            if type(policy) is FixedScalingPolicy:
                settings["scaling_policy"] = AskingNobody(policy.scaling_config)
            return super()._initialize_and_run_controller(**settings)  # type: ignore[misc]

    class AskingNobody(FixedScalingPolicy):
        def _send_resource_request(self) -> None:
            pass

        _maybe_send_resource_request = _cancel_resource_request = _send_resource_request

    return Lean


def _catching_sigterm() -> Any:
    """Ray Train's own thread runs the training; signals are caught in the process's main one."""
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class Catching(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: Any) -> None:
            worker_group.execute(catch_sigterm)

    return Catching()


@contextmanager
def _listening(points: Any, attempt: str, listen: Listen) -> Iterator[None]:
    """Hand what the workers of an attempt say to `listen` in a thread, until it is over."""
    from ray.exceptions import RayError
    from ray.util.queue import Empty

    def drain() -> None:
        # Long waits: asking five times a second took 5% of a core from the training beside it.
        while True:
            try:
                source, kind, values = points.get(timeout=30)
            except Empty:
                continue
            except RayError:
                logger.warning("the queue of the workers' reports is gone; training goes on")
                return
            if source != attempt:  # a late word of an attempt before
                continue
            if kind == _OVER:
                return
            try:
                listen(kind, values)
            except Exception as error:  # noqa: BLE001 (whatever a listener does)
                logger.warning("a report of the workers was lost: %s", error)

    # In the caller's context: its listeners ask Prefect which run they belong to.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(drain,), name="points", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with suppress(RayError):
            points.put((attempt, _OVER, {}))
        thread.join(timeout=60)

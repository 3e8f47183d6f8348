"""A stage's training as a Ray Job of a cluster: it outlives the flow that began it.

The submission id is the stage's short key. So a flow that was killed and is started again finds the
training that still runs and follows it, instead of starting a second one.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_exponential

from pipelines.cluster import bring_token
from pipelines.points import spooled_points
from pipelines.reasons import TrainingError
from pipelines.supervising import finished, write_order
from sdn.journal import journal_files, read_lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray.job_submission import JobSubmissionClient

    from pipelines.worker import StageOrder
    from sdn.checkpoint import Checkpoint

    Listen = Callable[[str, dict[str, Any]], None]

logger = logging.getLogger(__name__)
ORDER = "SDN_ORDER"
"""Variable of the job's environment with the order, as JSON."""
EVENTS = "events"
"""Folder of the training's place with what the job says, beside the points."""
_POLL_S = 1.0
_PATIENCE_S = 180.0
"""How long the cluster may be out of reach while a job is followed."""
_STOPPED_WITHIN_S = 30.0
_LIVE = {"PENDING", "RUNNING"}


class ClusterError(RuntimeError):
    """The Ray cluster cannot be asked; the text says what to do."""


def train_as_job(order: StageOrder, address: str, *, listen: Listen) -> Checkpoint:
    """Train a stage as a Ray Job: follow the one that runs, or submit it.

    Args:
        order: what to train.
        address: of the cluster: `auto`, `host:port`, or the `http://..` of its dashboard.
        listen: as in `pipelines.supervising.train_stage`; what was said before is said again.

    Returns:
        The last checkpoint.

    Raises:
        TrainingError: the job failed or was stopped from outside.
        ClusterError: the cluster cannot be reached.
        KnownFailureError: as `pipelines.supervising.finished`.
    """
    last = finished(order)
    if last is not None:
        return last
    client = connect(address)
    _ensure(client, order)
    following = _Following(order, listen)
    try:
        status = _status(client, order.name)
        while status in _LIVE:
            following()
            time.sleep(_POLL_S)
            status = _status(client, order.name)
    except BaseException:  # Ctrl-C, SIGTERM, a cancelled flow; a killed one cannot and need not
        confirmed = stop_job(client, order)
        logger.warning(
            "job %s %s", order.name, "is stopped" if confirmed else "did not confirm its end"
        )
        raise
    following()
    last = finished(order)
    if last is not None:
        return last
    if status == "STOPPED":
        raise TrainingError(
            f"the Ray job {order.name} was stopped; the same command goes on from its newest "
            "checkpoint"
        )
    raise TrainingError(
        following.error or f"the Ray job {order.name} failed:\n{_log(client, order)}"
    )


def connect(address: str) -> JobSubmissionClient:
    """A client for the cluster's jobs.

    Raises:
        ClusterError: no cluster there, one without a dashboard, or one that refuses the token.
    """
    from ray.job_submission import JobSubmissionClient

    bring_token()
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        raise ClusterError(
            f"the Ray cluster at SDN_RAY_ADDRESS={address} cannot be asked for jobs ({error}): "
            "check that it runs, was started with its dashboard (ray[default], "
            "--include-dashboard=true), and that this account has its token (RAY_AUTH_TOKEN or "
            "~/.ray/auth_token)"
        ) from error


def stop_job(
    client: JobSubmissionClient, order: StageOrder, within_s: float = _STOPPED_WITHIN_S
) -> bool:
    """Stop a stage's job and wait until it and its actors are gone.

    Its driver gets SIGTERM first and may write a last checkpoint.

    Args:
        client: of the cluster.
        order: whose job it is.
        within_s: seconds to wait for the confirmation.

    Returns:
        Whether the end is confirmed: no live status, and no actor of the job left.
    """
    until = time.monotonic() + within_s
    try:
        if _status(client, order.name) in _LIVE:
            client.stop_job(order.name)
        while time.monotonic() < until:
            if _status(client, order.name) not in _LIVE and not _actors_alive(client, order.name):
                return True
            time.sleep(0.5)
    except (RuntimeError, OSError) as error:
        logger.warning("job %s cannot be stopped: %s", order.name, error)
    return False


def _actors_alive(client: JobSubmissionClient, name: str) -> int:
    """Actors of a job that live, as the dashboard knows them.

    Detached ones belong to the cluster: the first job makes Ray's own, which hold no core.
    """
    from ray.util.state import list_actors

    job = client.get_job_info(name).job_id
    if job is None:
        return 0
    found = list_actors(
        address=client.get_address(),
        filters=[("job_id", "=", job), ("state", "!=", "DEAD")],
        detail=True,
        raise_on_missing_output=False,
    )
    return sum(not actor.is_detached for actor in found)


def _ensure(client: JobSubmissionClient, order: StageOrder) -> None:
    """Submit the job unless one of its name lives; of two at a time one wins, both follow it."""
    status = _status(client, order.name)
    if status in _LIVE:
        logger.warning("job %s runs already and is followed", order.name)
        return
    if status is not None:  # an id that has ended must be forgotten before it is used again
        client.delete_job(order.name)
    try:
        client.submit_job(
            entrypoint=f"{sys.executable} -m pipelines.train_job",
            submission_id=order.name,
            runtime_env={
                "env_vars": {
                    ORDER: write_order(order).decode(),
                    "RAY_JOB_STOP_WAIT_TIME_S": str(round(order.grace_s)),
                }
            },
            metadata={"stage": order.stage},
        )
    except RuntimeError:
        if _status(client, order.name) not in _LIVE:
            raise
        logger.warning("job %s was submitted by another flow and is followed", order.name)


@retry(
    retry=retry_if_exception_type((ConnectionError, OSError)),
    wait=wait_exponential(0.5, max=10),
    stop=stop_after_delay(_PATIENCE_S),
    reraise=True,
)
def _status(client: JobSubmissionClient, name: str) -> str | None:
    """Status of a job; None where there is none of this name."""
    try:
        return str(client.get_job_status(name).value)
    except RuntimeError as error:
        if "does not exist" in str(error) or "404" in str(error):
            return None
        raise


def _log(client: JobSubmissionClient, order: StageOrder) -> str:
    """The last lines that the job's driver wrote."""
    try:
        return "\n".join(client.get_job_logs(order.name).splitlines()[-15:])
    except (RuntimeError, OSError) as error:
        return f"(its log cannot be read: {error})"


class _Following:
    """Reads what the job and its ranks write down, and hands on what is new."""

    def __init__(self, order: StageOrder, listen: Listen) -> None:
        self._place, self._listen = order.place(), listen
        self._step, self._event = -1, -1
        self.error: str | None = None

    def __call__(self) -> None:
        try:
            for point in spooled_points(self._place, self._step):
                self._step = point["step"]
                self._listen("step", point)
            for name in journal_files(self._place, EVENTS):
                for line in read_lines(self._place, name):
                    if line["step"] > self._event:
                        self._event = line["step"]
                        self._hear(line["kind"], line["values"])
        except OSError as error:
            logger.warning("what the training says cannot be read now: %s", error)

    def _hear(self, kind: str, values: dict[str, Any]) -> None:
        if kind == "error":
            self.error = values["text"]
        else:
            self._listen(kind, values)

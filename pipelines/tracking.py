"""Runs, points, sheets and files in MLflow. Tracking never stops the work it watches."""

from __future__ import annotations

import io
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image

from pipelines.fresh_databases import MLFLOW, lay
from pipelines.points import spooled_points
from pipelines.tracking_place import LOCAL_FILE, tracking_uri
from sdn.recording import SHEETS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.settings import Settings
    from sdn.data.files import Files

logger = logging.getLogger(__name__)

TRACKING_ERRORS = (MlflowException, ConnectionError)
"""What MLflow raises where a server or database does not do as asked."""
KEY_TAG = "sdn.key"
OWNER_TAG = "sdn.flow_run"
"""Tag of a run: the flow run that works on it, or was the last to do so."""
_SHEET_TAG = "sdn.sheet_step"
_POINTS = 20
"""Points a request: MLflow takes 1000 metrics in one, and a point has up to 33."""
_VALUES = (
    "rate",
    "gradient_norm",
    "images_per_s",
    "waiting_share",
    "memory_gib",
    "gpu_share",
    "images_seen",
)
"""Of a point, beside its losses."""
_LAST = "points/done"
"""A metric of every point; the step of its newest is what MLflow has."""


def _metrics(point: dict[str, Any]) -> list[Metric]:
    """All values of a point."""
    values = {
        **point["losses"],
        **{name: value for name in _VALUES if (value := point.get(name)) is not None},
        _LAST: 1.0,
    }
    return [Metric(k, float(v), point["time_ms"], point["step"]) for k, v in values.items()]


def client(settings: Settings) -> mlflow.MlflowClient:
    """A client of the tracking server and registry."""
    settings.local.mkdir(parents=True, exist_ok=True)
    # MLflow's own patience is four minutes for each request to a server that is gone.
    for name, value in {"MAX_RETRIES": "1", "BACKOFF_FACTOR": "1", "TIMEOUT": "10"}.items():
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    for name, value in settings.logins.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri(settings)
    if settings.tracking_uri is None:
        lay(MLFLOW, settings.local / LOCAL_FILE)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return mlflow.MlflowClient(uri, uri)


class Tracker:
    """One parent run of a pipeline and its nested runs, found again by the keys they carry.

    Args:
        settings: where MLflow is.
        recipe: names the experiment.
        owner: the flow run that works on them; "" for none.
    """

    def __init__(self, settings: Settings, recipe: str, owner: str = "") -> None:
        self.settings = settings
        self.recipe = recipe
        self.owner = owner
        self._client: mlflow.MlflowClient | None = None
        self._experiment: str | None = None
        self._finding = threading.Lock()

    @property
    def client(self) -> mlflow.MlflowClient:
        """The client, made at its first use."""
        if self._client is None:
            self._client = client(self.settings)
        return self._client

    @property
    def experiment(self) -> str:
        """Id of the recipe's experiment, made at its first use."""
        if self._experiment is None:
            name = f"sdn-{self.recipe}"
            found = self.client.get_experiment_by_name(name)
            if found is not None:
                self._experiment = found.experiment_id
            else:
                place = None
                if not tracking_uri(self.settings).startswith("http"):
                    place = (self.settings.local / "mlflow-artifacts").as_uri()
                self._experiment = self.client.create_experiment(name, artifact_location=place)
        return self._experiment

    def run(self, name: str, key: str, parent: str | None = None) -> str:
        """Id of the run that carries this key: found, or made anew."""
        with self._finding:  # two threads that look at once would both make it
            found = self.client.search_runs(
                [self.experiment], f"tags.`{KEY_TAG}` = '{key}' and tags.`sdn.name` = '{name}'"
            )
            if not found:
                tags = {KEY_TAG: key, "sdn.name": name, "mlflow.runName": name}
                if parent is not None:
                    tags["mlflow.parentRunId"] = parent
                if self.owner:
                    tags[OWNER_TAG] = self.owner
                made = self.client.create_run(self.experiment, tags=tags, run_name=name)
                return str(made.info.run_id)
        (known, *_) = found
        if known.info.status == "FAILED":  # tried again now
            self.client.update_run(known.info.run_id, "RUNNING")
        if known.info.status != "FINISHED" and self.owner != known.data.tags.get(OWNER_TAG, ""):
            self.client.set_tag(known.info.run_id, OWNER_TAG, self.owner)
        return str(known.info.run_id)

    def log(
        self,
        run: str,
        *,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Parameters, final metrics (at step 0) and tags of a run; repeatable."""
        flat = [Param(k, str(v)[:6000]) for k, v in (params or {}).items()]
        for start in range(0, len(flat), 100):
            self.client.log_batch(run, params=flat[start : start + 100])
        self.client.log_batch(
            run,
            metrics=[Metric(k, float(v), 0, 0) for k, v in (metrics or {}).items()],
            tags=[RunTag(k, v) for k, v in (tags or {}).items()],
        )

    def points(self, run: str, place: Files) -> None:
        """Mirror a training's spooled points, from the last step that MLflow already has.

        MLflow's own history says which that is: all values of a step go there in one request, so
        nothing is doubled and nothing left out, wherever an earlier mirroring broke off.
        """
        history = self.client.get_metric_history(run, _LAST)
        last = max((metric.step for metric in history), default=-1)
        found = spooled_points(place, last)
        for start in range(0, len(found), _POINTS):
            metrics = [m for point in found[start : start + _POINTS] for m in _metrics(point)]
            self.client.log_batch(run, metrics=metrics)

    def rungs(self, run: str, points: Sequence[Mapping[str, Any]]) -> None:
        """A trial's scores over the images seen; said again they are the same points."""
        metrics = [
            Metric(name, float(point[name]), 0, point["images_seen"])
            for point in points
            for name in ("value", "low", "high", "seconds")
        ]
        if metrics:
            self.client.log_batch(run, metrics=metrics)

    def sheets(self, run: str, place: Files) -> None:
        """Mirror a training's contact sheets; MLflow shows them with a slider over the steps."""
        tag = self.tag(run, _SHEET_TAG)
        last = -1 if tag is None else int(tag)
        names = sorted(info.name for info in place.walk(SHEETS))
        for name in names:
            step = int(name.rpartition("-")[2].partition(".")[0])
            if step <= last:
                continue
            with Image.open(io.BytesIO(place.read(name))) as picture:
                self.client.log_image(run, picture.convert("RGB"), key="sheet", step=step)
            self.client.set_tag(run, _SHEET_TAG, str(step))

    def file(self, run: str, path: Path, place: str | None = None) -> None:
        """A file as an artifact of a run."""
        self.client.log_artifact(run, str(path), place)

    def text(self, run: str, text: str, name: str) -> None:
        """A text as an artifact of a run."""
        self.client.log_text(run, text, name)

    def table(self, run: str, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Rows as an artifact that MLflow's page shows as a table."""
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        self.client.log_table(run, columns, name)

    def finished(self, run: str) -> bool:
        """Whether everything about a run is there already."""
        return bool(self.client.get_run(run).info.status == "FINISHED")

    def tag(self, run: str, name: str) -> str | None:
        """A tag of a run; None where it has none of this name."""
        found: str | None = self.client.get_run(run).data.tags.get(name)
        return found

    def finish(self, run: str, status: str = "FINISHED") -> None:
        """End a run; ending it again changes nothing."""
        self.client.set_terminated(run, status)


def end_left(settings: Settings, owner: str) -> int:
    """Set the runs that a dead flow run has left RUNNING to FAILED, as a failing one does itself.

    What another flow run works on by now stays as it is.

    Args:
        settings: where MLflow is.
        owner: id of the dead flow run.

    Returns:
        How many there were.
    """
    asked = client(settings)
    experiments = asked.search_experiments(filter_string="name LIKE 'sdn-%'")
    left = asked.search_runs(
        [one.experiment_id for one in experiments],
        f"tags.`{OWNER_TAG}` = '{owner}' and attributes.status = 'RUNNING'",
    )
    for run in left:
        asked.set_terminated(run.info.run_id, "FAILED")
    return len(left)

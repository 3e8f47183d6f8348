"""What `sdn doctor` looks at."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pipelines.diagnosis.check import Check, guarded
from pipelines.diagnosis.clusters import look_at_ray
from pipelines.diagnosis.environment import look_at_environment, malformed, readable
from pipelines.diagnosis.flow_server import look_at_prefect
from pipelines.diagnosis.machine import look_at_device, look_at_machine
from pipelines.diagnosis.notices import look_at_notices
from pipelines.diagnosis.packages import look_at_packages
from pipelines.diagnosis.places import look_at_landing, look_at_store
from pipelines.diagnosis.tracking_server import look_at_mlflow
from sdn.recipes import recipe

if TYPE_CHECKING:
    from pipelines.diagnosis.check import Look

__all__ = ["Check", "diagnose"]


def diagnose(store: str | None) -> list[Check]:
    """Everything that a run needs, in the order in which it needs it."""
    settings = readable(store)
    looks: dict[str, Look] = {
        "packages": look_at_packages,
        "device": partial(look_at_device, settings),
        "machine": partial(look_at_machine, settings),
        "settings": malformed,
        "environment": partial(look_at_environment, settings),
        "store": partial(look_at_store, settings),
        "landing place": partial(look_at_landing, settings),
        "Prefect": partial(look_at_prefect, settings),
        "MLflow": partial(look_at_mlflow, settings),
        "Ray": partial(look_at_ray, settings, recipe("openmoji")),
        "notices": partial(look_at_notices, settings),
    }
    return [check for what, look in looks.items() for check in guarded(what, look)]

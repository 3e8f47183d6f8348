"""What is nice to have is left out where it fails, with a warning; loads nothing heavy."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines.masking import masked

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)


@contextmanager
def never_raising(what: str) -> Iterator[None]:
    """Turn a failure of tracking into a warning: training goes on without it.

    Args:
        what: is left out; of MLflow, or of Prefect where it begins with "Prefect's".
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever MLflow or its server throws)
        reason = masked((str(error) or type(error).__name__).splitlines()[0])
        named = what if what.startswith("Prefect's ") else f"MLflow: {what}"
        logger.warning("%s failed and is left out (%s)", named, reason)

"""Loss weights that an earlier search has found, by the run, the stage or the file they are in."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.store import DONE, open_store

if TYPE_CHECKING:
    from pipelines.settings import Settings

logger = logging.getLogger(__name__)

WEIGHTS = "weights.json"
SEARCH_TAG = "sdn.search"
"""Of a pipeline's run in MLflow: the run of its search."""


def found_changes(where: str, recipe: str, settings: Settings) -> dict[str, str]:
    """Changes of a config that bring the values that a search has found, and search no more.

    Args:
        where: the id of an MLflow run (of the whole pipeline or of its search), the name of a
            stage of the store (`search-0123456789abcdef`), or a `weights.json` or its folder.
        recipe: which is to be changed; that another one was searched is logged.
        settings: where store and MLflow are.

    Raises:
        ValueError: nothing of this name, or it holds no weights.
    """
    return _changes(_read(where, settings), where, recipe)


def _read(where: str, settings: Settings) -> bytes:
    where = where.removeprefix("stages/")
    path = Path(where).expanduser()
    if path.is_dir():
        path /= WEIGHTS
    if path.is_file():
        return path.read_bytes()
    if re.fullmatch(r"search-[0-9a-f]{16}", where):
        store = open_store(settings.store, settings.cache, settings.s3_endpoint)
        if not store.files(f"stages/{where}").exists(DONE):
            raise ValueError(f"--weights-from {where}: {store.uri} has no such finished search")
        found = store.fetch(f"stages/{where}") / WEIGHTS
        if not found.is_file():
            raise ValueError(f"--weights-from {where}: that search had nothing to compare")
        return found.read_bytes()
    if re.fullmatch(r"[0-9a-f]{32}", where):
        return _of_mlflow(where, settings)
    raise ValueError(
        f"--weights-from {where}: expected the id of an MLflow run, a search of the store such as "
        f"search-0123456789abcdef, or a {WEIGHTS} or its folder"
    )


def _of_mlflow(run: str, settings: Settings) -> bytes:
    from pipelines.tracking import TRACKING_ERRORS, client
    from pipelines.tracking_place import shown_uri

    asked = client(settings)
    try:
        tags = asked.get_run(run).data.tags
        found = run if tags.get("sdn.name") == "search" else tags.get(SEARCH_TAG)
        if found is None:
            raise ValueError(f"--weights-from {run}: that run of MLflow has no search")
        with tempfile.TemporaryDirectory(prefix="sdn-weights-") as folder:
            path = asked.download_artifacts(found, WEIGHTS, folder)
            return Path(path).read_bytes()
    except (*TRACKING_ERRORS, OSError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--weights-from {run}: MLflow at {shown_uri(settings)} gives no {WEIGHTS} of that "
            f"run ({why})"
        ) from error


def _changes(content: bytes, where: str, recipe: str) -> dict[str, str]:
    try:
        found = json.loads(content)
        changes: dict[str, Any] = dict(found["changes"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"--weights-from {where}: expected a {WEIGHTS} as a search writes it, an object with "
            f"`changes`; this is damaged or another file ({type(error).__name__}: {error})"
        ) from error
    if (searched := found.get("recipe", recipe)) != recipe:
        logger.warning(
            "the weights of %s were searched on the recipe %s, not on %s: nothing says that they "
            "are better here; a search of this recipe's own does",
            where,
            searched,
            recipe,
        )
    return {key: json.dumps(value) for key, value in changes.items()} | {"search.trials": "0"}

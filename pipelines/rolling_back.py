"""A rollback as people ask for it: which model, its files checked, everybody told."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.exceptions import MlflowException

from pipelines.digests import folder_digest
from pipelines.model_check import model_folder_in
from pipelines.notifying import notify
from pipelines.registry import SHA256, DamagedModelError, RegistryError, champions
from pipelines.succession import Succession
from pipelines.tracking import client
from pipelines.tracking_place import shown_uri, version_page

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipelines.settings import Settings

logger = logging.getLogger(__name__)


def registered_name(settings: Settings, name: str = "") -> str:
    """The name of a registered model; the one whose champion is the latest where none is given.

    Raises:
        RegistryError: nothing is registered, or no model has a champion.
    """
    if settings.tracking_uri is None and not (settings.local / "mlflow.db").exists():
        raise RegistryError(
            f"expected a registered model, but nothing is registered in {settings.store}: --store "
            "names another store"
        )
    names = [name] if name else champions(settings)
    if not names:
        raise RegistryError(
            f"expected a model with a champion, but {shown_uri(settings)} has none: name the "
            "model if its champion was deleted, or another store with --store"
        )
    return names[0]


def roll_back(settings: Settings, name: str = "", reason: str = "") -> dict[str, Any]:
    """Make a registered model's last champion the champion again, its files checked before.

    People are told.

    Args:
        settings: where the registry is.
        name: of the registered model; empty for the one whose champion is the latest.
        reason: for people; kept.

    Returns:
        `name`, `before`, `after` (versions), `term` (its number), `reason`, `sha256` (None where
        the version was registered without one), `seconds`.

    Raises:
        RegistryError: nothing to go back to, damaged files, or no registry; nothing has changed.
    """
    began = time.monotonic()
    name = registered_name(settings, name)
    digests: list[str | None] = []
    reached = client(settings)
    try:
        term = Succession(reached, name).roll_back(
            lambda version: digests.append(check_files(reached, name, version)),
            reason or "rolled back by hand",
        )
    except MlflowException as error:
        raise RegistryError(
            f"{shown_uri(settings)} failed in the rollback of {name} ({error}): see `sdn "
            "doctor`, then ask for it again; what was begun is completed then"
        ) from error
    notify(
        settings,
        "promotion",
        f"{name} version {term.champion} is champion again",
        f"By hand, in place of version {term.previous}: {term.why}",
        version_page(settings, name, term.champion),
        key=f"term-{name}-{term.number}",
    )
    return {
        "name": name,
        "before": term.previous,
        "after": term.champion,
        "term": term.number,
        "reason": term.why,
        "sha256": digests[-1],
        "seconds": round(time.monotonic() - began, 2),
    }


def check_files(reached: MlflowClient, name: str, version: str) -> str | None:
    """Download a version's model folder and compare its digest with the one it was registered with.

    Returns:
        The digest; None, with a warning, where the version was registered before there were any.

    Raises:
        RegistryError: the files cannot be had.
        DamagedModelError: they are not what was registered; the text names both digests.
    """
    expected = reached.get_model_version(name, version).tags.get(SHA256)
    with tempfile.TemporaryDirectory() as folder:
        try:
            place = mlflow.artifacts.download_artifacts(
                # Not `models:/...`: that asks the registry of the process, not of this client.
                reached.get_model_version_download_uri(name, version),
                dst_path=folder,
                tracking_uri=reached.tracking_uri,
            )
            found = folder_digest(model_folder_in(Path(place)))
        except (MlflowException, OSError, ValueError) as error:
            raise RegistryError(
                f"expected the files of {name} version {version}, but they cannot be had "
                f"({error}): nothing was changed. Restore them from a backup and ask again"
            ) from error
    if expected is None:
        logger.warning("%s version %s has no tag %s: its files are there, but nothing says whether "
                       "they are as registered", name, version, SHA256)  # fmt: skip
        return None
    if found != expected:
        raise DamagedModelError(
            f"expected the files of {name} version {version} to have the digest {expected}, but "
            f"they have {found}: they are damaged, and nothing was changed. Restore them from a "
            "backup and ask again"
        )
    return found

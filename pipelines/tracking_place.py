"""Where runs and models are kept, and how that is named; without loading MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.masking import masked, public

if TYPE_CHECKING:
    from pipelines.settings import Settings


LOCAL_FILE = "mlflow.db"
"""Beside the store, where no server is configured."""


def tracking_uri(settings: Settings) -> str:
    """Where runs and models are kept: the configured server, or SQLite beside the store."""
    return settings.tracking_uri or f"sqlite:///{settings.local / LOCAL_FILE}"


def shown_uri(settings: Settings) -> str:
    """The same for texts: without the password that a database's address may have."""
    return masked(tracking_uri(settings))


def public_uri(uri: str) -> str:
    """An address without user and password, as a link for everybody; the same on all machines."""
    return public(uri, hidden=())


def version_page(settings: Settings, name: str, version: str) -> str | None:
    """MLflow's page of a version; None where MLflow is no server."""
    uri = public_uri(tracking_uri(settings))
    return f"{uri.rstrip('/')}/#/models/{name}/versions/{version}" if "http" in uri[:5] else None


def artifact_page(settings: Settings, experiment: str, run: str, name: str) -> str:
    """Address of MLflow's page of a run's artifact, no name or password in it; "" without one."""
    uri = public_uri(tracking_uri(settings))
    if not uri.startswith("http"):
        return ""
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run}/artifacts/{name}"

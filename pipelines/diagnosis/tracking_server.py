"""MLflow: reached, of our version, allowed in, and able to keep files."""

from __future__ import annotations

import uuid
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx

from pipelines.diagnosis.check import Check
from pipelines.tracking_place import public_uri, tracking_uri

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.settings import Settings

_LOCAL = {"", "localhost", "127.0.0.1", "::1"}


def look_at_mlflow(settings: Settings) -> Iterator[Check]:
    """The server, or the embedded database."""
    uri = tracking_uri(settings)
    if not uri.startswith("http"):
        yield _embedded(uri, settings)
        return
    shown = public_uri(uri).rstrip("/")
    with httpx.Client(base_url=uri.rstrip("/"), auth=_credentials(), timeout=5) as client:
        reached = _reached(client, shown)
        yield reached
        if reached.ok:
            yield _same_version(client)
            yield _artifacts(client)


def _credentials() -> httpx.Auth | None:
    """Those that MLflow's own client would use."""
    from mlflow.utils.credentials import read_mlflow_creds

    found = read_mlflow_creds()
    if found.username and found.password:
        return httpx.BasicAuth(found.username, found.password)
    return None


def _embedded(uri: str, settings: Settings) -> Check:
    """SQLite on a file is for the processes of one machine."""
    shared = uri.startswith("sqlite") and _machines(settings)
    return Check(
        ok=not shared,
        what="MLflow",
        found=f"{public_uri(uri)}, and runs come from several machines ({shared})"
        if shared
        else f"embedded, {public_uri(uri)}",
        remedy="start one (`sdn serve mlflow`) and set SDN_TRACKING_URI=http://... on all of them: "
        "SQLite is for one machine",
    )


def _machines(settings: Settings) -> str:
    """What says that several machines take part; "" where nothing does."""
    for name, address in {
        "PREFECT_API_URL": settings.prefect_api_url,
        "SDN_RAY_ADDRESS": settings.ray_address,
    }.items():
        if address is None or address == "auto":
            continue
        host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
        if host not in _LOCAL:
            return f"{name} is on {host}"
    return ""


def _reached(client: httpx.Client, shown: str) -> Check:
    """Whether it answers, and lets us in."""
    remedy = (
        "start it with `sdn serve mlflow` (`sdn up` for all of it), or unset SDN_TRACKING_URI to "
        "run embedded"
    )
    try:
        health = client.get("/health")
        search = client.get("/api/2.0/mlflow/experiments/get?experiment_id=0")
    except httpx.HTTPError as error:
        found = f"{shown}: {str(error) or type(error).__name__}"
        return Check(ok=False, what="MLflow", found=found, remedy=remedy)
    status = search.status_code if health.is_success else health.status_code
    if status in {401, 403}:
        remedy = (
            "set SDN_AUTH=user:password (or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD) "
            "to an account of it"
        )
    ok = health.is_success and status not in {401, 403} and not search.is_server_error
    return Check(ok=ok, what="MLflow", found=f"{shown} answers {status}", remedy=remedy)


def _same_version(client: httpx.Client) -> Check:
    """The same minor version as here."""
    there, here = client.get("/version").text.strip(), version("mlflow")
    return Check(
        ok=there.split(".")[:2] == here.split(".")[:2],
        what="MLflow version",
        found=f"server {there}, here {here}",
        remedy=f"install mlflow=={there} here, or {here} there",
    )


def _artifacts(client: httpx.Client) -> Check:
    """Whether files of runs can be kept where new experiments put them."""
    answer = client.get("/api/2.0/mlflow/experiments/get?experiment_id=0")
    known: dict[str, Any] = answer.json() if answer.is_success else {}
    root = known.get("experiment", {}).get("artifact_location", "mlflow-artifacts:/")
    remedy = "start it by `sdn serve mlflow --artifacts PLACE`, with a place that it may write to"
    if not root.startswith("mlflow-artifacts:"):
        path = Path(urlsplit(root).path)
        if root.startswith(("http", "s3:", "gs:", "wasbs:")):
            return Check(ok=True, what="MLflow artifacts", found=f"{public_uri(root)}, not tried")
        return _folder(path, remedy)
    probe = f"/api/2.0/mlflow-artifacts/artifacts/.probe-{uuid.uuid4().hex}"
    written = client.put(probe, content=b"probe")
    if written.is_success:
        client.delete(probe)
    return Check(
        ok=written.is_success,
        what="MLflow artifacts",
        found="writable" if written.is_success else f"writing answers {written.status_code}",
        remedy=remedy,
    )


def _folder(path: Path, remedy: str) -> Check:
    """An artifact root that clients write to by themselves."""
    import os

    ok = path.is_dir() and os.access(path, os.W_OK)
    found = f"{path}, writable from here" if ok else f"{path} cannot be written from here"
    return Check(ok=ok, what="MLflow artifacts", found=found, remedy=remedy)

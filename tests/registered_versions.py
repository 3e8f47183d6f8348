"""A registered model whose versions have files and digests, but no weights: quick to make."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlflow

from pipelines.digests import folder_digest
from pipelines.registry import SHA256

if TYPE_CHECKING:
    from pathlib import Path

NAME = "sdn-some"


def registered(
    folder: Path, *, versions: int, uri: str | None = None, name: str = NAME
) -> mlflow.MlflowClient:
    """Versions 1 to N in the registry of a store, or of a server; a client of it."""
    uri = uri or f"sqlite:///{folder / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri, uri)
    place = None if uri.startswith("http") else (folder / "mlflow-artifacts").as_uri()
    experiment = client.create_experiment(name, artifact_location=place)
    client.create_registered_model(name)
    for number in range(1, versions + 1):
        made = folder / "made" / name / str(number)
        (made / "model").mkdir(parents=True)
        (made / "model" / "student.safetensors").write_bytes(bytes([number]) * 100_000)
        (made / "model" / "config.json").write_text(f'{{"number": {number}}}')
        run = client.create_run(experiment).info
        client.log_artifacts(run.run_id, str(made), "model/artifacts")
        client.create_model_version(
            name,
            source=f"{run.artifact_uri}/model",
            run_id=run.run_id,
            tags={SHA256: folder_digest(made / "model")},
        )
    return client


def aliases(client: mlflow.MlflowClient, name: str = NAME) -> dict[str, str]:
    """Alias -> the version that it names."""
    found = client.get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}

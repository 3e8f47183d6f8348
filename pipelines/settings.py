"""Where things are: the only reader of environment variables.

With none set, everything runs embedded. Each address or URI below replaces one embedded part by a
server, and the same code then runs there.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Environment variables `SDN_*`."""

    model_config = SettingsConfigDict(env_prefix="SDN_", frozen=True)

    store: str = Field(
        default="runs",
        description="Where stages, data sets and models lie: a local folder or s3://bucket/prefix.",
    )
    cache: Path = Field(
        default=Path("~/.cache/sdn"),
        description="Local copies of what lies in a remote store.",
    )
    cache_gib: float = Field(
        default=8.0,
        gt=0,
        description="What blocks of data sets read from S3 may take there, in GiB.",
    )
    tracking_uri: str | None = Field(
        default=None,
        description="MLflow server or database; by default SQLite inside the store's local folder.",
    )
    ray_address: str | None = Field(
        default=None, description="Ray cluster; by default Ray runs inside this process."
    )
    s3_endpoint: str | None = Field(
        default=None, description="Endpoint of an S3 server that is not Amazon's."
    )
    cpus: int | None = Field(
        default=None,
        ge=1,
        description="Cores to use on this machine; by default those this process may run on.",
    )
    stall_s: float = Field(
        default=300.0,
        gt=0,
        description="Seconds without a step after which a rank is taken for hung: its stack is "
        "shown, and the attempt repeated.",
    )
    grace_s: float = Field(
        default=25.0,
        ge=0,
        description="Seconds that a training which is told to stop may take for its checkpoint.",
    )
    landing: str | None = Field(
        default=None,
        description="Where new data arrive: a folder or s3://bucket/prefix; only ever read.",
    )
    dataset: str | None = Field(
        default=None,
        description="The data set that grows from there; by default `landed` in the store.",
    )
    traceback: bool = Field(
        default=False, description="Show where an error came from, not its text alone."
    )
    prefect_api_url: str | None = Field(
        default=None,
        validation_alias="PREFECT_API_URL",
        description="Prefect's own variable: the server that flows report to.",
    )

    @property
    def grown(self) -> str:
        """Place of the data set that grows from the landing place."""
        return self.dataset or f"{self.store.rstrip('/')}/landed"

    @property
    def local(self) -> Path:
        """Folder for what must lie on this machine: the store itself where it is local."""
        return self.cache.expanduser() if "://" in self.store else Path(self.store).resolve()


def job_order(name: str) -> str:
    """What a Ray Job was given to do, out of the variable of this name.

    Raises:
        ValueError: it is not set: this process is no job.
    """
    import os

    found = os.environ.get(name)
    if found is None:
        raise ValueError(f"{name} is not set: pipelines.train_job runs as a Ray Job, see sdn run")
    return found

"""Where things are: the only reader of environment variables.

With none set, everything runs embedded. Each address or URI below replaces one embedded part by a
server, and the same code then runs there.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

_PASSWORD_CHARS = 12
_SHORTEST_CREDENTIAL = 6
"""Characters; to hide anything shorter would make texts unreadable, and keep no secret."""
_READ_ELSEWHERE = (
    *("SDN_ORDER", "SDN_PART", "SDN_PART_OF"),
    *("SDN_CHAOS", "SDN_CHAOS_SEED", "SDN_PICTURES"),
)
"""By Ray Jobs of ours and the processes of a stack, and by the tests."""


class Settings(BaseSettings):
    """Environment variables `SDN_*`."""

    # A variable that is set to nothing is not set: compose and Kubernetes pass optional ones so.
    model_config = SettingsConfigDict(env_prefix="SDN_", frozen=True, env_ignore_empty=True)

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
    gpu: bool | None = Field(
        default=None,
        description="Whether ranks and trials have a GPU each; by default where the machine or the "
        "cluster has one now. A cluster that grows from none has to be told.",
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
    auth: SecretStr | None = Field(
        default=None,
        description="user:password of the Prefect and MLflow servers; asked for by those that "
        "`sdn serve` starts, and sent to them.",
    )
    database: SecretStr | None = Field(
        default=None,
        description="Database of the server that `sdn serve` starts, where its URI has a password.",
    )
    stack: Path | None = Field(
        default=None,
        description="Folder of the local stack; by default the store's where that is local.",
    )
    reconcile_s: float = Field(
        default=10.0,
        gt=0,
        description="Seconds between two looks of the reconciler for flow runs that are dead.",
    )
    silence_s: float = Field(
        default=600.0,
        ge=60,
        description="Seconds without a word after which a flow run on another machine counts as "
        "dead.",
    )
    revivals: int = Field(
        default=3,
        ge=0,
        description="How often a flow run that died is started again.",
    )
    notify_command: str | None = Field(
        default=None,
        description="Command, run without a shell, that is told of failures, promotions, "
        "rejections and trouble with data: JSON on its standard input, SDN_NOTICE_* in its "
        "environment.",
    )
    notify_url: SecretStr | None = Field(
        default=None,
        description="Address to which the same is sent as JSON, as to a Slack webhook.",
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
    s3_key: SecretStr | None = Field(
        default=None,
        validation_alias="AWS_ACCESS_KEY_ID",
        description="Amazon's own variable: whose keys S3 is asked with.",
    )
    s3_secret: SecretStr | None = Field(
        default=None,
        validation_alias="AWS_SECRET_ACCESS_KEY",
        description="Amazon's own variable: the secret of that key.",
    )

    @property
    def grown(self) -> str:
        """Place of the data set that grows from the landing place."""
        return self.dataset or f"{self.store.rstrip('/')}/landed"

    @property
    def local(self) -> Path:
        """Folder for what must lie on this machine: the store itself where it is local."""
        return self.cache.expanduser() if "://" in self.store else Path(self.store).resolve()

    @property
    def credentials(self) -> tuple[str, str] | None:
        """User and password out of SDN_AUTH; None where it is not set.

        Raises:
            ValueError: it is not what all servers take; the text does not repeat it.
        """
        if self.auth is None:
            return None
        user, colon, password = self.auth.get_secret_value().partition(":")
        wrong = None
        if not colon or not user:
            wrong = "there is no user before a colon"
        elif not (password.isascii() and password.isprintable() and user.isascii()):
            wrong = "there are characters that are not printable ASCII"
        elif len(password) < _PASSWORD_CHARS:  # MLflow takes no shorter ones
            wrong = f"the password has {len(password)} characters"
        if wrong:
            raise ValueError(
                f"SDN_AUTH is to be user:password, the password of {_PASSWORD_CHARS} or more "
                f"printable ASCII characters, but {wrong}: set another, such as "
                'SDN_AUTH="sdn:$(openssl rand -hex 16)"'
            )
        return user, password

    @property
    def logins(self) -> dict[str, str]:
        """What Prefect's and MLflow's own clients read, out of SDN_AUTH; empty without it.

        Raises:
            ValueError: as `credentials`.
        """
        found = self.credentials
        if found is None:
            return {}
        user, password = found
        return {
            "PREFECT_API_AUTH_STRING": f"{user}:{password}",
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
        }


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


def credentials() -> list[str]:
    """Values of environment variables that are credentials by their names, and their passwords.

    Of a database's address its password alone, wherever it stands: all else of it may be shown.
    """
    import os

    named = re.compile(
        r"(?!.*(FILE|PATH|DIR)$).*(SECRET|PASSWORD|TOKEN(?!IZERS)|API_KEY|ACCESS_KEY|AUTH_STRING|"
        r"CREDENTIAL|SDN_AUTH$|SDN_NOTIFY_URL$)"
    )
    found = [value for name, value in os.environ.items() if named.match(name.upper())]
    # Of user:password, as in SDN_AUTH and PREFECT_API_AUTH_STRING, a server may repeat the half.
    found += [value.partition(":")[2] for value in found if "://" not in value]
    found += _passwords_in(os.environ.get("SDN_DATABASE", ""))
    return [value for value in found if len(value) >= _SHORTEST_CREDENTIAL]


def _passwords_in(address: str) -> list[str]:
    """The passwords in an address, as they stand there and as they are meant."""
    try:
        parts = urlsplit(address)
        asked = parse_qs(parts.query)
    except ValueError:
        return [address]  # of no form that is known
    found = [parts.password or "", *asked.get("password", [])]
    return [*found, *(unquote(one) for one in found)]


def known_variables() -> list[str]:
    """All `SDN_*` variables that anything reads."""
    fields = Settings.model_fields.items()
    own = [f"SDN_{name.upper()}" for name, field in fields if field.validation_alias is None]
    return sorted({*own, *_READ_ELSEWHERE})


def sdn_variables() -> list[str]:
    """The `SDN_*` variables that are set, known or not."""
    import os

    return sorted(name for name in os.environ if name.upper().startswith("SDN_"))


def threads_variable() -> str | None:
    """Threads that OpenMP is told to take in each process; None where it may choose."""
    import os

    return os.environ.get("OMP_NUM_THREADS")

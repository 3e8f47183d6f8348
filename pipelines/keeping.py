"""Programs that are kept running: supervisor's `supervisord`, told what to keep and asked about it.

One that ends is started again; logs are cut and rotated; the end of all is one signal.
"""

from __future__ import annotations

import configparser
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LOG_BYTES, _LOG_OLD = "5MB", "2"
_CONFIG, _LOGS = "supervisor.conf", "logs"
_GROUP = "parts"
NAME = "supervisor"
_RETRIES = 3
"""Failures to start in a row, each waited for a second longer, after which it is given up."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A program to keep."""

    name: str
    argv: Sequence[str]
    """No argument is secret: they lie in a file, and everyone on the machine can see them."""
    env: Mapping[str, str]
    """Beside the environment of all; nothing secret."""
    start_s: int
    """One that ends earlier than this has failed to start."""
    stop_s: int
    """What it may take to end, in seconds."""
    folder: Path | None = None
    """Where it runs; None for the keeper's folder."""


@dataclass(frozen=True, kw_only=True)
class KeptState:
    """What the supervisor says of a program."""

    name: str
    state: str
    """RUNNING, STARTING (for `start_s`), BACKOFF (it failed, and is tried again), FATAL (given up),
    STOPPED, STOPPING, EXITED."""
    pid: int
    """0 where there is no process."""
    why: str
    """Supervisor's own words."""


class Keeper:
    """The supervisor of the programs in a folder."""

    def __init__(self, folder: Path, socket: Path) -> None:
        """Find a supervisor.

        Args:
            folder: of its configuration and logs, and where its programs run.
            socket: at which it is asked; a path of fewer than 100 bytes.
        """
        self.folder, self._socket = folder, socket

    def log(self, name: str) -> Path:
        """Where a program's output goes."""
        return self.folder / _LOGS / f"{name}.log"

    def tail(self, name: str, lines: int = 12) -> str:
        """The last that a program said."""
        try:
            return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(it said nothing)"

    def start(self, programs: Sequence[Kept], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Begin to keep programs; returns at once.

        Args:
            programs: started all at the same time.
            env: the whole environment of the supervisor and all programs.

        Returns:
            The supervisor; it outlives this process.
        """
        (self.folder / _LOGS).mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.folder / _CONFIG).open("w") as file:
            self.config(programs).write(file)
        command = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", _CONFIG]
        with (self.folder / _LOGS / "supervisor.out").open("wb") as out:
            return subprocess.Popen(  # noqa: S603 (a package of ours)
                command,
                cwd=self.folder,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # a Ctrl-C in the terminal is told it in good order
            )

    def config(self, programs: Sequence[Kept]) -> configparser.RawConfigParser:
        """What supervisord reads. It runs in the folder, so that no path has to be quoted."""
        found = configparser.RawConfigParser()
        found["supervisord"] = {
            "nodaemon": "true",
            "logfile": f"{_LOGS}/{NAME}.log",
            "logfile_maxbytes": _LOG_BYTES,
            "logfile_backups": _LOG_OLD,
            "pidfile": "supervisor.pid",
            "umask": "077",
        }
        found["unix_http_server"] = {"file": _plain(str(self._socket)), "chmod": "0600"}
        found["rpcinterface:supervisor"] = {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        }
        # One group: groups are ended one after another, each waited for.
        found[f"group:{_GROUP}"] = {"programs": ",".join(one.name for one in programs)}
        for program in programs:
            variables = ",".join(f'{k}="{_plain(v)}"' for k, v in program.env.items())
            found[f"program:{program.name}"] = {
                "command": _plain(shlex.join(program.argv)),
                "environment": variables,
                **({} if program.folder is None else {"directory": _plain(str(program.folder))}),
                "autorestart": "true",
                "startsecs": str(program.start_s),
                "startretries": str(_RETRIES),
                "stopwaitsecs": str(program.stop_s),
                "stopasgroup": "true",
                "killasgroup": "true",
                "redirect_stderr": "true",
                "stdout_logfile": f"{_LOGS}/{program.name}.log",
                "stdout_logfile_maxbytes": _LOG_BYTES,
                "stdout_logfile_backups": _LOG_OLD,
            }
        return found

    def states(self) -> dict[str, KeptState] | None:
        """Each program, by its name; None where no supervisor answers."""
        found = self._ask("getAllProcessInfo")
        if found is None:
            return None
        return {
            one["name"]: KeptState(
                name=one["name"],
                state=one["statename"],
                pid=one["pid"],
                why=one["spawnerr"] or one["description"],
            )
            for one in found
        }

    def again(self, name: str) -> None:
        """Start a program that was stopped or given up."""
        self._ask("startProcess", f"{_GROUP}:{name}", False)

    def stop(self, name: str) -> None:
        """End one program and wait for it; it is not started again by itself."""
        self._ask("stopProcess", f"{_GROUP}:{name}")

    def _ask(self, method: str, *args: object) -> Any:
        """The supervisor's answer; None where none answers or it does not do as asked."""
        import http.client
        import xmlrpc.client

        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        asked = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
        with suppress(OSError, xmlrpc.client.Error, http.client.HTTPException):
            return getattr(asked.supervisor, method)(*args)
        return None


def _plain(text: str) -> str:
    """Text in which supervisor finds nothing to fill in.

    Raises:
        ValueError: it would end within.
    """
    if any(end in text for end in (" ;", " #", "\n", '"')):
        raise ValueError(f'{text!r} holds " ;", " #", a quotation mark or a line\'s end: rename it')
    return text.replace("%", "%%")

"""A real Postgres on 127.0.0.1 (Debian's), started and ended by the tests that need one."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

USER = "sdn"


@dataclass(frozen=True)
class Postgres:
    """Where it is."""

    port: int
    password: str
    folder: Path
    """Of its log, among others."""

    def address(self, driver: str, database: str) -> str:
        """Without the password, which comes beside it (PGPASSWORD)."""
        return f"postgresql+{driver}://{USER}@127.0.0.1:{self.port}/{database}"

    def dump(self) -> str:
        """Everything that all databases hold, as text."""
        return self._run("pg_dumpall", "--no-role-passwords")

    def make(self, database: str) -> None:
        """A new database."""
        self._run("createdb", database)

    def _run(self, program: str, *arguments: str) -> str:
        where = ["--host=127.0.0.1", f"--port={self.port}", f"--username={USER}"]
        done = subprocess.run(
            [str(program_of(program)), *where, *arguments],
            env=os.environ | {"PGPASSWORD": self.password},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


def program_of(name: str) -> Path | None:
    """One of Postgres' programs; those of a server are not on Debian's path."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = str(places[-1]) if places else shutil.which(name)
    return None if found is None else Path(found)


def require() -> None:
    """Skip without Postgres, but fail where nothing may be skipped."""
    if program_of("initdb") is None:
        assert not os.environ.get("CI"), "apt-get install postgresql"
        pytest.skip("no Postgres: apt-get install postgresql")


@contextmanager
def running(password: str):
    """The server, its data in a folder of its own; ended, with all it started, by its id."""
    require()
    # Its folder must be one that its user can reach: pytest's are root's alone.
    folder = Path(tempfile.mkdtemp(prefix="sdn-pg-"))
    as_user = _unprivileged(folder)
    (folder / "password").write_text(password)
    made = subprocess.run(
        [
            str(program_of("initdb")), f"--pgdata={folder / 'data'}", f"--username={USER}",
            f"--pwfile={folder / 'password'}", "--auth=scram-sha-256", "--no-sync",
        ],
        cwd=folder, capture_output=True, text=True, check=False, **as_user,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (folder / "password").unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": folder,
        "fsync": "off",
        "log_statement": "ddl",
    }
    command = [str(program_of("postgres")), "-D", str(folder / "data")]
    command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    with (folder / "postgres.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **as_user)
    found = Postgres(port, password, folder)
    try:
        _wait(found, process)
        yield found
    finally:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.send_signal(signal.SIGQUIT)
        _, alive = psutil.wait_procs(tree, timeout=20)
        for part in alive:
            part.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged(folder: Path) -> dict[str, int]:
    """Options for a process that Postgres does not refuse as root's."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _wait(found: Postgres, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while True:
        ready = subprocess.run(
            [str(program_of("pg_isready")), "--host=127.0.0.1", f"--port={found.port}"],
            stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if ready.returncode == 0:
            return
        log = (found.folder / "postgres.log").read_text()
        assert process.poll() is None, log
        assert time.monotonic() < until, log
        time.sleep(0.2)

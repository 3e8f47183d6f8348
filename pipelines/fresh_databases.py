"""Empty databases of Prefect and MLflow, made once an environment: a new store begins with a copy.

Their migrations tell all of their history to each new file, which takes 11 s of a core for both. So
`python -m pipelines.fresh_databases` has them do it when the project is installed (`make` does);
where that was not done, another version is installed since, or the file system has no hard links,
the servers migrate as ever.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFECT, MLFLOW = "prefect", "mlflow"
_PATIENCE_S = 300
_TAIL = 2000


def place(kind: str) -> Path:
    """Where the empty database of the installed version lies, if it was made."""
    return _folder() / f"{kind}-{version(kind)}.db"


def _folder() -> Path:
    return Path(sysconfig.get_path("data")) / "share" / "sdn"


def file_of(kind: str, env: Mapping[str, str]) -> Path | None:
    """The SQLite file in which a server has its database; None where it may be elsewhere.

    Args:
        kind: `PREFECT` or `MLFLOW`.
        env: the server's environment.
    """
    if kind == MLFLOW:
        return sqlite_file(env.get("MLFLOW_BACKEND_STORE_URI", ""))
    named = any(name.startswith("PREFECT_") and "DATABASE" in name for name in env)
    home = env.get("PREFECT_HOME")
    return None if named or not home else Path(home).expanduser() / "prefect.db"


def sqlite_file(uri: str) -> Path | None:
    """The file of a database's address; None for another kind, for none, or one with options."""
    scheme, _, file = uri.partition(":///")
    plain = file and not file.startswith(":") and "?" not in file
    return Path(file) if plain and scheme.startswith("sqlite") else None


def lay(kind: str, path: Path) -> bool:
    """Begin a database with a copy of the empty one.

    Args:
        kind: `PREFECT` or `MLFLOW`.
        path: of the new SQLite file; never one that is there already.

    Returns:
        Whether it was; else the server makes it, or says what is wrong with the place.
    """
    # What an earlier database has left in a log would be played into the new one.
    if any(path.with_name(path.name + end).exists() for end in ("", "-wal", "-journal")):
        return False
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = _beside(path)
        try:
            with place(kind).open("rb") as source, new.open("xb") as target:
                shutil.copyfileobj(source, target)
                # After a loss of power a name shall not stand for half a database.
                target.flush()
                os.fsync(target.fileno())
            # Unlike a rename it fails where another process was quicker, whose server may write.
            os.link(new, path)
        finally:
            new.unlink(missing_ok=True)
        return True
    return False


def _beside(path: Path) -> Path:
    """A name that nothing has: what is written there is no second name of a database in use."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def make(kind: str) -> None:
    """Have the installed version migrate an empty file, and keep it.

    Raises:
        RuntimeError: it refuses, with the last that it said, or what it made is damaged.
        OSError: the file cannot be written.
        subprocess.TimeoutExpired: it does not come to an end.
    """
    others = ("PREFECT_", "MLFLOW_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    target = place(kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(target)
    with tempfile.TemporaryDirectory(prefix="sdn-database-") as folder:
        made = Path(folder) / f"{kind}.db"
        address = f"sqlite:///{made}"
        words = ("server", "database", "upgrade", "-y") if kind == PREFECT else ("db", "upgrade")
        done = subprocess.run(  # noqa: S603 (a package that the project needs)
            [sys.executable, "-m", kind, *words, *((address,) if kind == MLFLOW else ())],
            env=env
            | {
                "PREFECT_HOME": folder,
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aio{address}",
                "DO_NOT_TRACK": "1",
                "MLFLOW_DISABLE_TELEMETRY": "true",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{kind} does not make its database: {done.stdout[-_TAIL:]}")
        try:
            with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(new)) as copy:
                source.backup(copy)
                found = copy.execute("PRAGMA integrity_check").fetchone()[0]
            if found != "ok":
                raise RuntimeError(f"the database that {kind} has made is damaged: {found}")
            with new.open("rb") as file:
                os.fsync(file.fileno())
            new.replace(target)
        finally:
            new.unlink(missing_ok=True)


def main() -> None:
    """Make both that are not there; those of other versions, and leftovers, go."""
    kinds = (PREFECT, MLFLOW)
    kept = {place(kind) for kind in kinds}
    for path in {*_folder().glob("*.db"), *_folder().glob(".*.db.*")} - kept:
        path.unlink(missing_ok=True)
    with ThreadPoolExecutor() as pool:
        wanted = {kind: pool.submit(make, kind) for kind in kinds if not place(kind).exists()}
    for kind, made in wanted.items():
        if error := made.exception():
            # Installing does not fail for it: nothing but the time of first starts is lost.
            print(f"no empty database of {kind} ({error}); its servers make their own", flush=True)


if __name__ == "__main__":
    main()

"""Empty databases of Prefect and MLflow, made once an environment: a new store begins with a copy.

Their migrations tell all of their history to each new file, which takes 11 s of a core. So
`python -m pipelines.fresh_databases` has them do it when the project is installed (`make` does);
where that was not done, or another version is installed since, the servers migrate as ever.
"""

from __future__ import annotations

import os
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
_TAIL = 2000


def place(kind: str) -> Path:
    """Where the empty database of the installed version lies, if it was made."""
    return Path(sysconfig.get_path("data")) / "share" / "sdn" / f"{kind}-{version(kind)}.db"


def file_of(kind: str, env: Mapping[str, str]) -> Path | None:
    """The SQLite file in which a server has its database; None where it may be elsewhere.

    Args:
        kind: `PREFECT` or `MLFLOW`.
        env: the server's environment.
    """
    if kind == MLFLOW:
        return sqlite_file(env.get("MLFLOW_BACKEND_STORE_URI", ""))
    named = any(name.startswith("PREFECT_") and "DATABASE" in name for name in env)
    return None if named or "PREFECT_HOME" not in env else Path(env["PREFECT_HOME"], "prefect.db")


def sqlite_file(uri: str) -> Path | None:
    """The file of a database's address; None for another kind, or one with options."""
    scheme, found, file = uri.partition(":///")
    return Path(file) if found and scheme.startswith("sqlite") and "?" not in file else None


def lay(kind: str, path: Path) -> bool:
    """Begin a database with a copy of the empty one.

    Args:
        kind: `PREFECT` or `MLFLOW`.
        path: of the new SQLite file, in a folder that is there; never one that is there already.

    Returns:
        Whether it was; else the server makes it.
    """
    # What an earlier database has left in a log would be played into the new one.
    if any(path.with_name(path.name + end).exists() for end in ("", "-wal", "-journal")):
        return False
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        try:
            shutil.copyfile(place(kind), new)
            # Unlike a rename it fails where another process was quicker, whose server may write.
            os.link(new, path)
        finally:
            new.unlink(missing_ok=True)
        return True
    return False


def make(kind: str) -> None:
    """Have the installed version migrate an empty file, and keep it.

    Raises:
        RuntimeError: it refuses, with the last that it said.
        OSError: the file cannot be written.
    """
    others = ("PREFECT_", "MLFLOW_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    target = place(kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sdn-database-") as folder:
        made = Path(folder) / f"{kind}.db"
        address = f"sqlite:///{made}"
        words = ("server", "database", "upgrade", "-y") if kind == PREFECT else ("db", "upgrade")
        done = subprocess.run(  # noqa: S603 (a package of ours)
            [sys.executable, "-m", kind, *words, *((address,) if kind == MLFLOW else ())],
            env=env
            | {
                "PREFECT_HOME": folder,
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aio{address}",
                "DO_NOT_TRACK": "1",
                "MLFLOW_DISABLE_TELEMETRY": "true",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{kind} does not make its database: {done.stdout[-_TAIL:]}")
        new = target.with_name(f".{target.name}.{os.getpid()}")
        with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(new)) as copy:
            source.backup(copy)
    new.replace(target)


def main() -> None:
    """Make both that are not there."""
    missing = [kind for kind in (PREFECT, MLFLOW) if not place(kind).exists()]
    with ThreadPoolExecutor() as pool:
        list(pool.map(make, missing))


if __name__ == "__main__":
    main()

"""The empty databases that installing makes are those that the servers make for themselves."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from pipelines import fresh_databases
from pipelines.fresh_databases import MLFLOW, PREFECT, place

pytestmark = pytest.mark.timeout(300)

OWN = {
    PREFECT: """
import asyncio
from prefect.server.database import provide_database_interface
asyncio.run(provide_database_interface().create_db())
""",
    MLFLOW: """
import os
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
SqlAlchemyStore(os.environ["FILE"], "artifacts")
""",
}
"""What each server does with its file when it starts."""


def schema(path):
    """What a database has: all that there is, and the rows of its tables.

    Columns with their types in their order; what else a statement has as words without an order,
    for Prefect's migrations write a table's foreign keys in one that changes.
    """
    with closing(sqlite3.connect(path)) as database:
        found = database.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        made = {
            (kind, name): sorted(re.findall(r"[^\s,()]+", sql or "")) for kind, name, sql in found
        }
        rows = {}
        for name in [name for kind, name, _ in found if kind == "table"]:
            made["columns", name] = database.execute(f'PRAGMA table_xinfo("{name}")').fetchall()
            keys = database.execute(f'PRAGMA foreign_key_list("{name}")').fetchall()
            made["keys", name] = sorted(str(key[2:]) for key in keys)
            if kept := database.execute(f'SELECT * FROM "{name}"').fetchall():
                rows[name] = kept
    return made, rows


@pytest.mark.parametrize("kind", [PREFECT, MLFLOW])
def test_an_empty_database_is_the_servers_own(kind, monkeypatch, tmp_path):
    """The same tables, indices and rows, but for the experiment that MLflow's server begins with:
    where its artifacts lie, only the server knows.
    """
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "environment" / name))
    fresh_databases.make(kind)
    own = tmp_path / "own.db"
    scheme = "sqlite+aiosqlite" if kind == PREFECT else "sqlite"
    env = {
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"{scheme}:///{own}",
        "FILE": f"{scheme}:///{own}",
    }
    subprocess.run([sys.executable, "-c", OWN[kind]], check=True, env=os.environ | env)
    (made, rows), (theirs, their_rows) = schema(place(kind)), schema(own)
    assert made == theirs
    assert len(made) > 50
    assert {name for name in their_rows if name not in rows} <= {"experiments"}
    assert {name: kept for name, kept in their_rows.items() if name in rows} == rows
    assert "alembic_version" in rows

"""A new store's databases begin as copies of empty ones."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from contextlib import closing
from importlib.metadata import version

import pytest

from pipelines import fresh_databases
from pipelines.fresh_databases import MLFLOW, PREFECT, lay, place

CONTENT = b"an empty database"


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path):
    """Where the empty ones lie; that of MLflow is there."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "environment" / name))
    place(MLFLOW).parent.mkdir(parents=True)
    place(MLFLOW).write_bytes(CONTENT)


def test_a_new_database_begins_as_a_copy(tmp_path):
    """Of the version that is installed; nothing else is left beside it."""
    folder = tmp_path / "new"
    folder.mkdir()
    assert lay(MLFLOW, folder / "mlflow.db")
    assert (folder / "mlflow.db").read_bytes() == CONTENT
    assert [one.name for one in folder.iterdir()] == ["mlflow.db"]
    assert version("mlflow") in place(MLFLOW).name


def test_of_another_version_nothing_is_taken(tmp_path, monkeypatch):
    """Its tables may be others: the server migrates, as it does where none was made."""
    assert not lay(PREFECT, tmp_path / "prefect.db")
    monkeypatch.setattr(fresh_databases, "version", lambda name: "99.0")
    assert not lay(MLFLOW, tmp_path / "mlflow.db")
    assert not [one for one in tmp_path.iterdir() if one.suffix == ".db"]


@pytest.mark.parametrize("end", ["", "-wal", "-journal"])
def test_nothing_is_laid_over_what_is_there(tmp_path, end):
    """Nor beside a log of an earlier database, which would be played into it."""
    there = tmp_path / f"mlflow.db{end}"
    there.write_bytes(b"mine")
    assert not lay(MLFLOW, tmp_path / "mlflow.db")
    assert there.read_bytes() == b"mine"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["environment", there.name]


def test_another_process_may_be_quicker(tmp_path, monkeypatch):
    """Its server may have written already: what it has stays."""
    copy = shutil.copyfile

    def copied(source, target):
        copy(source, target)
        (tmp_path / "mlflow.db").write_bytes(b"theirs")

    monkeypatch.setattr("shutil.copyfile", copied)
    assert not lay(MLFLOW, tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_no_half_of_one(tmp_path, monkeypatch):
    """The server, which needs the room too, says so."""

    def full(source, target):
        target.write_bytes(CONTENT[:3])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("shutil.copyfile", full)
    assert not lay(MLFLOW, tmp_path / "mlflow.db")
    assert [one.name for one in tmp_path.iterdir()] == ["environment"]


def test_one_that_cannot_be_made_says_why(monkeypatch):
    """And leaves none that would be taken for one."""
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="prefect does not make its database"):
        fresh_databases.make(PREFECT)
    assert not place(PREFECT).exists()


def tables(path):
    """Name -> how it was made, and how many rows it has."""
    with closing(sqlite3.connect(path)) as database:
        found = database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'")
        return {
            name: (sql, database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0])
            for name, sql in found.fetchall()
        }


def test_what_is_made_is_whole_and_has_the_log_of_its_migrations(monkeypatch, tmp_path):
    """Out of a file with a write-ahead log, as Prefect leaves one."""
    program = tmp_path / "program"
    text = """#!/bin/sh
    file=${PREFECT_SERVER_DATABASE_CONNECTION_URL#sqlite+aiosqlite:///}
    exec PYTHON -c "
import sqlite3, sys, os
d = sqlite3.connect(sys.argv[1])
d.execute('PRAGMA journal_mode = WAL')
d.execute('CREATE TABLE t (a)')
d.execute('INSERT INTO t VALUES (1)')
d.commit()
os._exit(0)" "$file"
    """
    program.write_text(text.replace("PYTHON", sys.executable))
    program.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(program))
    fresh_databases.make(PREFECT)
    assert tables(place(PREFECT)) == {"t": ("CREATE TABLE t (a)", 1)}
    left = [one.name for one in place(PREFECT).parent.iterdir()]
    assert sorted(left) == sorted([place(PREFECT).name, place(MLFLOW).name])

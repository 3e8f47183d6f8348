"""A new store's databases begin as copies of empty ones."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect import settings

from pipelines import fresh_databases
from pipelines.flows.early_server import early_server
from pipelines.fresh_databases import MLFLOW, PREFECT, lay, place, sqlite_file
from pipelines.serve_commands import _become
from pipelines.serving import Program
from pipelines.settings import Settings
from pipelines.tracking import client

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
    copy = shutil.copyfileobj

    def copied(source, target):
        copy(source, target)
        (tmp_path / "mlflow.db").write_bytes(b"theirs")

    monkeypatch.setattr("shutil.copyfileobj", copied)
    assert not lay(MLFLOW, tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_process_has_left_a_second_name(tmp_path):
    """Nothing is written by that name again, whichever process comes: it is a database in use."""
    assert lay(MLFLOW, tmp_path / "mlflow.db")
    for end in (os.getpid(), os.getpid() + 1):
        os.link(tmp_path / "mlflow.db", tmp_path / f".mlflow.db.{end}")
    (tmp_path / "mlflow.db").write_bytes(b"in use")
    (tmp_path / "mlflow.db").rename(tmp_path / "moved.db")
    assert lay(MLFLOW, tmp_path / "mlflow.db")
    assert (tmp_path / "moved.db").read_bytes() == b"in use"


def test_a_full_disk_leaves_no_half_of_one(tmp_path, monkeypatch):
    """The server, which needs the room too, says so."""

    def full(source, target):
        target.write(CONTENT[:3])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("shutil.copyfileobj", full)
    assert not lay(MLFLOW, tmp_path / "mlflow.db")
    assert [one.name for one in tmp_path.iterdir()] == ["environment"]


def test_a_place_that_cannot_be_is_left_to_the_server(tmp_path):
    """It says what is wrong with it; a folder that is not there yet is made."""
    (tmp_path / "file").touch()
    assert not lay(MLFLOW, tmp_path / "file" / "mlflow.db")
    assert lay(MLFLOW, tmp_path / "new" / "folder" / "mlflow.db")


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:///runs/mlflow.db", "runs/mlflow.db"),
        ("sqlite+aiosqlite:////data/prefect.db", "/data/prefect.db"),
        *((uri, None) for uri in ("sqlite:///:memory:", "sqlite://", "sqlite:///", "")),
        ("sqlite:///m.db?mode=ro", None),
        ("postgresql:///name", None),
    ],
)
def test_which_addresses_are_files(uri, file):
    """Nothing is written for a database in memory, elsewhere, or with options."""
    assert sqlite_file(uri) == (file and Path(file))


def test_one_that_cannot_be_made_says_why(monkeypatch):
    """And leaves none that would be taken for one."""
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="prefect does not make its database"):
        fresh_databases.make(PREFECT)
    assert not place(PREFECT).exists()


def test_installing_goes_on_without_them(monkeypatch, capsys):
    """It says which is missing; those of other versions and leftovers go, what is there stays."""
    others = [place(MLFLOW).with_name(name) for name in ("mlflow-1.0.db", ".prefect-1.db.12ab")]
    for path in others:
        path.touch()
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    fresh_databases.main()
    assert "no empty database of prefect" in capsys.readouterr().out
    assert [path.name for path in place(MLFLOW).parent.iterdir()] == [place(MLFLOW).name]
    assert place(MLFLOW).read_bytes() == CONTENT


def test_one_that_is_damaged_is_not_kept(monkeypatch, tmp_path):
    """A file that the version has made, and that its own engine cannot read."""
    program = tmp_path / "program"
    lines = ("#!/bin/sh", "file=${PREFECT_SERVER_DATABASE_CONNECTION_URL#*:///}")
    program.write_text("\n".join([*lines, 'head -c 9000 /dev/zero | tr "\\0" x > "$file"', ""]))
    program.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises((RuntimeError, sqlite3.DatabaseError)):
        fresh_databases.make(PREFECT)
    assert [path.name for path in place(MLFLOW).parent.iterdir()] == [place(MLFLOW).name]


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


@pytest.fixture
def laid(monkeypatch, tmp_path):
    """What is begun with a copy, by whoever does."""
    found = []
    for module in ("pipelines.fresh_databases", "pipelines.tracking"):
        monkeypatch.setattr(f"{module}.lay", lambda kind, path: found.append((kind, path)))
    return found


def test_a_server_begins_before_it_runs(laid, monkeypatch, tmp_path):
    """`sdn serve`, in the environment of the program that it becomes."""
    ran = []
    monkeypatch.setattr("os.execvpe", lambda *words: ran.append(list(laid)))
    monkeypatch.setattr("pipelines.serve_commands._end_predecessors", lambda: None)
    monkeypatch.chdir(tmp_path)
    for database in (MLFLOW, None):
        env = {"MLFLOW_BACKEND_STORE_URI": "sqlite:///of/the/server.db"}
        _become(Program(argv=("mlflow",), env=env, database=database))
    assert ran == [[(MLFLOW, Path("of/the/server.db"))]] * 2


def test_runs_beside_the_store_begin_so(laid, tmp_path):
    """MLflow's file there; where a server is named it has its own."""
    client(Settings(store=str(tmp_path / "runs")))
    assert laid == [(MLFLOW, tmp_path / "runs" / "mlflow.db")]
    client(Settings(store=str(tmp_path / "runs"), tracking_uri="http://127.0.0.1:9"))
    assert len(laid) == 1


def test_prefects_temporary_server_begins_so(laid, monkeypatch, tmp_path):
    """In Prefect's home, before the server starts; where a server is named nothing is done."""
    started = []
    server = SimpleNamespace(start=lambda: started.append(list(laid)))
    monkeypatch.setattr("prefect.server.api.server.SubprocessASGIServer", lambda: server)
    for url in (None, "http://127.0.0.1:9/api"):
        changes = {
            settings.PREFECT_API_URL: url,
            settings.PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{tmp_path}/p.db",
            settings.PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True,
        }
        with settings.temporary_settings(changes), early_server() as answered:
            answered()
    assert started == [[(PREFECT, tmp_path / "p.db")]]

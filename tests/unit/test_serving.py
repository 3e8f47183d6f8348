"""What `sdn serve` becomes: arguments, environment, and what it refuses."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from pipelines import serving, stack_sockets
from pipelines.fresh_databases import file_of
from pipelines.settings import Settings

SECRET = "a-secret-of-tests"
LOGIN = f"anna:{SECRET}"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("SDN_AUTH", "SDN_DATABASE", "SDN_S3_ENDPOINT", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SDN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "owner")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


def mlflow(host="127.0.0.1", artifacts="s3://sdn/mlflow", uri="sqlite:///m.db"):
    return serving.mlflow_program(Settings(), host=host, port=5000, uri=uri, artifacts=artifacts)


def prefect(host="127.0.0.1", uri=None):
    return serving.prefect_program(Settings(), host=host, port=4200, uri=uri)


def s3(host="127.0.0.1"):
    inside = range(9001, 9001 + serving.WEED_PORTS)
    return serving.s3_program(
        Settings(), host=host, port=8333, folder=Path("data").resolve(), inside=list(inside)
    )


def ray(**changes):
    options = {
        "host": None, "port": 6379, "dashboard_port": 8265, "join": None, "cpus": None,
        "folder": None, "inside": [1, 2, 3],
    }  # fmt: skip
    return serving.ray_program(**options | changes)


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("", False), ("10.0.0.7", False), ("host", False)),
    ],
)
def test_which_addresses_are_this_machine_alone(host, alone):
    """Loopback addresses and `localhost`; a name that could be anything is not."""
    assert serving.is_loopback(host) is alone


@pytest.mark.parametrize("program", [mlflow, prefect])
def test_a_server_without_a_login_stays_on_this_machine(program, monkeypatch):
    """Beyond loopback it is refused, with what was expected, what came and what to do."""
    program()
    with pytest.raises(serving.ExposedError) as refused:
        program(host="0.0.0.0")
    for part in ("0.0.0.0", "SDN_AUTH=user:password", "is not set", "127.0.0.1"):
        assert part in str(refused.value)
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    program(host="0.0.0.0")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("short", "no user before a colon"),
        (":a-long-password", "no user before a colon"),
        ("anna:short", "5 characters"),
        ("anna:umläute-sind-lang", "not printable ASCII"),
        ("anna:a-long\npassword", "not printable ASCII"),
    ],
)
def test_a_login_that_servers_refuse_is_told_without_repeating_it(monkeypatch, value, why):
    """What is wrong is said, and the value is not."""
    monkeypatch.setenv("SDN_AUTH", value)
    with pytest.raises(ValueError, match=why) as refused:
        prefect()
    assert value.rpartition(":")[2] not in str(refused.value).replace("user:password", "")


@pytest.mark.parametrize("program", [mlflow, prefect, s3, ray])
def test_no_secret_is_an_argument(monkeypatch, program):
    """Everyone on a machine can read the arguments of its processes."""
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    assert SECRET not in " ".join(program().argv)


def test_mlflow_asks_for_the_login_on_loopback_too(monkeypatch):
    """With SDN_AUTH set it is always asked for; its files hold no password."""
    assert "--app-name" not in mlflow().argv
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    found = mlflow()
    assert found.argv[-2:] == ("--app-name", "basic-auth")
    assert found.env["MLFLOW_AUTH_ADMIN_USERNAME"] == "anna"
    assert found.env["MLFLOW_AUTH_ADMIN_PASSWORD"] == SECRET
    assert found.env["MLFLOW_BASIC_AUTH_FAIL_CLOSED"] == "true"
    ((path, text),) = found.files.items()
    assert found.env["MLFLOW_AUTH_CONFIG_PATH"] == str(path)
    assert found.fresh == path.parent
    assert SECRET not in text


def test_mlflow_is_one_small_process_with_artifacts_on_s3(monkeypatch):
    """One worker, no runner of jobs; it, and not its clients, has the keys of S3."""
    monkeypatch.setenv("SDN_S3_ENDPOINT", "http://127.0.0.1:8333")
    found = mlflow()
    arguments = " ".join(found.argv)
    assert "--workers 1" in arguments
    assert "--artifacts-destination s3://sdn/mlflow" in arguments
    assert found.env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert found.env["MLFLOW_S3_ENDPOINT_URL"] == "http://127.0.0.1:8333"
    assert found.env["MLFLOW_BACKEND_STORE_URI"] == "sqlite:///m.db"
    with pytest.raises(ValueError, match="SDN_DATABASE"):
        mlflow(uri=None)


def test_prefect_asks_for_the_login_and_no_other_server(monkeypatch):
    """The server has the login, and an address of a server is taken out of its environment."""
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    found = prefect(uri="sqlite+aiosqlite:///p.db")
    env = found.environment({"PREFECT_API_URL": "http://elsewhere/api", "HOME": "h"})
    assert env["PREFECT_SERVER_API_AUTH_STRING"] == LOGIN
    assert env["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == "sqlite+aiosqlite:///p.db"
    assert env["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert env["HOME"] == "h"
    assert "PREFECT_API_URL" not in env


def test_a_servers_own_file_may_begin_as_a_copy(monkeypatch):
    """Prefect's in its home, MLflow's where it is told, with a login too; no database elsewhere."""
    home = {"PREFECT_HOME": "/somewhere/prefect"}
    elsewhere = {"PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:///elsewhere.db"}
    assert begins(prefect(), home) == Path("/somewhere/prefect/prefect.db")
    assert begins(prefect(), {"PREFECT_HOME": "~/p"}) == Path.home() / "p" / "prefect.db"
    assert begins(prefect(), {}) is None
    assert begins(prefect(), home | elsewhere) is None
    assert begins(prefect(uri="postgresql+asyncpg://db/prefect"), home) is None
    assert begins(mlflow(), home) == Path("m.db")
    assert begins(mlflow(uri="sqlite:////data/m.db"), {}) == Path("/data/m.db")
    assert begins(mlflow(uri="postgresql://db/mlflow"), {}) is None
    assert begins(mlflow(uri="sqlite:///m.db?mode=ro"), {}) is None
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    assert begins(mlflow(), {}) == Path("m.db")
    assert s3().database is None


def begins(program, given):
    return file_of(program.database, program.environment(given))


def test_pages_elsewhere_find_their_server(monkeypatch):
    """Prefect's page asks its own server, beyond this machine where it came from."""
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    name = "PREFECT_SERVER_UI_API_URL"
    assert prefect().environment({})[name] == "http://127.0.0.1:4200/api"
    assert prefect(host="0.0.0.0").environment({})[name] == "/api"
    assert prefect(host="0.0.0.0").environment({name: "https://x/api"})[name] == "https://x/api"


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_s3_without_an_owner_is_refused(monkeypatch, missing):
    """SeaweedFS without identities lets everybody do everything."""
    monkeypatch.delenv(missing)
    with pytest.raises(serving.ExposedError, match="AWS_SECRET_ACCESS_KEY"):
        s3()


def test_only_s3_itself_listens_beyond_this_machine():
    """Its other services ask nobody for anything."""
    found = s3(host="0.0.0.0").argv
    assert "-s3.ip.bind=0.0.0.0" in found
    assert "-ip.bind=127.0.0.1" in found
    ports = [int(one.partition("=")[2]) for one in found if ".port" in one and "=0" not in one]
    assert len(ports) == len(set(ports)) == serving.WEED_PORTS + 1


def test_a_worker_knows_its_server(monkeypatch):
    """Without one it is refused; with a login it brings it."""
    with pytest.raises(ValueError, match="PREFECT_API_URL"):
        serving.worker_program(Settings(), pool="sdn", kind="process")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    found = serving.worker_program(Settings(), pool="other", kind="kubernetes")
    assert found.argv[:3] == (sys.executable, "-m", "prefect")
    assert found.argv[-4:] == ("--pool", "other", "--type", "kubernetes")
    assert found.env["PREFECT_API_AUTH_STRING"] == LOGIN
    assert found.env["MLFLOW_TRACKING_PASSWORD"] == SECRET


def test_ray_asks_for_its_token_and_shows_its_dashboard_here_alone():
    """A head unless it joins one; the dashboard beyond this machine only with a host."""
    head = ray(cpus=2)
    assert head.env["RAY_AUTH_MODE"] == "token"
    assert {"--head", "--block", "--dashboard-host=127.0.0.1", "--num-cpus=2"} <= set(head.argv)
    assert "--node-ip-address=127.0.0.1" in head.argv
    wide = ray(host="0.0.0.0")
    assert "--dashboard-host=0.0.0.0" in wide.argv
    assert not [one for one in wide.argv if one.startswith("--node-ip-address")]
    node = ray(join="head:6379")
    assert "--address=head:6379" in node.argv
    assert node.env["RAY_AUTH_MODE"] == "token"
    assert not [one for one in node.argv if one == "--head" or one.startswith("--port")]


@pytest.mark.parametrize(
    "form", ["postgresql://sdn:{}@db/mlflow", "postgresql://db/mlflow?user=sdn&password={}"]
)
def test_a_password_in_an_argument_is_refused(monkeypatch, form):
    """A database's URI with a password, in either form, comes out of the environment."""
    uri = form.format(SECRET)
    with pytest.raises(ValueError, match="SDN_DATABASE") as refused:
        serving.database(uri, Settings())
    assert SECRET not in str(refused.value)
    monkeypatch.setenv("SDN_DATABASE", uri)
    assert serving.database(None, Settings()) == uri
    assert serving.database("sqlite:///x.db", Settings()) == "sqlite:///x.db"


def test_sockets_of_an_ended_s3_server_are_removed(tmp_path, monkeypatch):
    """Those at which nobody listens; another server may have come by the same port."""
    monkeypatch.setattr(stack_sockets, "_PATH", f"{tmp_path}/{{}}-{{}}.sock")
    for path, text in stack_sockets.note_of_sockets(tmp_path, {"s3": 1, "filer": 2}).items():
        path.write_text(text)
    with socket.socket(socket.AF_UNIX) as ended, socket.socket(socket.AF_UNIX) as lives:
        ended.bind(str(tmp_path / "s3-1.sock"))
        lives.bind(str(tmp_path / "filer-2.sock"))
        lives.listen()
        stack_sockets.clear_sockets(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["filer-2.sock"]
    stack_sockets.clear_sockets(tmp_path)  # nothing more to do

"""The local stack: where it is, what its processes and users are told, what state it is in."""

from __future__ import annotations

import os
import shlex
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from pipelines import stack_life, stack_state
from pipelines.keeping import Keeper, Kept, KeptState
from pipelines.marks import Marked
from pipelines.ports import HOST, PortError
from pipelines.settings import Settings
from pipelines.stack import Plan, Ports, Stack

LOGIN = "anna:a-login-of-tests"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("SDN_AUTH", "SDN_STORE", "SDN_STACK", "SDN_GRACE_S"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stack(tmp_path):
    """Not running; its runtime folder is removed at last."""
    found = Stack(tmp_path / "stack")
    yield found
    found.clear_runtime()


def state_of(monkeypatch, stack, kept, why, processes=()):
    monkeypatch.setattr(Keeper, "states", lambda self: kept)
    monkeypatch.setattr(stack_state, "marked", lambda folder: list(processes))
    monkeypatch.setattr(stack_state.Probe, "unhealthy", lambda *a: why)
    return stack_state.look(stack, Plan(), Settings())


def kept(name, state, pid=0):
    return KeptState(name=name, state=state, pid=pid, why="words")


def test_which_folder_a_stack_lies_in(monkeypatch, tmp_path):
    """The option, SDN_STACK, the store where it is local, else `runs`."""
    assert Stack.of(None, Settings()).folder == tmp_path / "runs" / "stack"
    monkeypatch.setenv("SDN_STORE", "s3://bucket/runs")
    assert Stack.of(None, Settings()).folder == tmp_path / "runs" / "stack"
    monkeypatch.setenv("SDN_STORE", "elsewhere")
    assert Stack.of(None, Settings()).folder == tmp_path / "elsewhere" / "stack"
    monkeypatch.setenv("SDN_STACK", str(tmp_path / "there" / "stack"))
    assert Stack.of(None, Settings()).folder == tmp_path / "there" / "stack"
    assert Stack.of("option", Settings()).folder == tmp_path / "option" / "stack"
    with pytest.raises(ValueError, match="local folder"):
        Stack.of("s3://bucket", Settings())


def test_credentials_are_made_once_for_their_owner_alone(stack):
    """A second start keeps them; nobody else can read them, nor what holds them."""
    stack.prepare(Plan(), Settings())
    before = stack.client_env(Plan(), Settings())
    stack.prepare(Plan(ray=True), Settings())
    after = stack.client_env(Plan(ray=True), Settings())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert before[name] == after[name]
    assert len(after["AWS_SECRET_ACCESS_KEY"]) == 40
    secrets = (after["AWS_SECRET_ACCESS_KEY"], (stack.folder / "ray-token").read_text())
    for path in stack.folder.rglob("*"):
        if path.is_file() and any(one in path.read_text() for one in secrets):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(stack.folder.stat().st_mode) == 0o700
    assert stack.plan() == Plan(ray=True)


def test_a_shell_that_sources_the_file_uses_the_stack(stack, monkeypatch):
    """Addresses, keys and the login are exported; the mark of its processes is not."""
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    plan = Plan(ports=Ports(prefect=4321, ray=6400), ray=True)
    stack.prepare(plan, Settings())
    done = subprocess.run(
        ["sh", "-c", f". {shlex.quote(str(stack.env_file))} && env"],
        env={"PATH": os.environ["PATH"], "AWS_SESSION_TOKEN": "old"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    env = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert stack.client_env(plan, Settings()).items() <= env.items()
    assert env["PREFECT_API_URL"] == f"http://{HOST}:4321/api"
    assert env["SDN_RAY_ADDRESS"] == f"{HOST}:6400"
    assert env["SDN_STORE"] == "s3://sdn/runs"
    assert env["SDN_STACK"] == str(stack.folder)
    assert env["PREFECT_API_AUTH_STRING"] == LOGIN
    assert not {"SDN_PART", "SDN_PART_OF", "AWS_SESSION_TOKEN"} & set(env)


def test_processes_take_nothing_from_other_servers(stack):
    """What is set for another server does not reach them; the length of a stop does."""
    stack.prepare(Plan(), Settings())
    given = {
        "PATH": "p", "SDN_GRACE_S": "7", "SDN_STORE": "elsewhere", "AWS_PROFILE": "work",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "other", "MLFLOW_TRACKING_URI": "other",
        "RAY_AUTH_TOKEN": "other",
    }  # fmt: skip
    env = stack.env(Plan(), Settings(), given)
    assert (env["PATH"], env["SDN_GRACE_S"]) == ("p", "7")
    assert "other" not in env.values()
    assert "AWS_PROFILE" not in env
    assert env["SDN_STORE"] == "s3://sdn/runs"
    assert env["PREFECT_HOME"].startswith(str(stack.folder))
    assert env["SDN_PART_OF"] == str(stack.folder)


def test_programs_are_the_commands_that_others_run(stack, monkeypatch):
    """`sdn serve` for each part, marked as such, with no secret in what is written down."""
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    monkeypatch.setenv("SDN_GRACE_S", "100")
    plan = Plan(ray=True)
    stack.prepare(plan, Settings())
    programs = stack.programs(plan, Settings())
    assert [one.name for one in programs] == [
        "s3",
        "mlflow",
        "prefect",
        "worker",
        "reconciler",
        "ray",
    ]
    for one in programs:
        does = ["reconcile"] if one.name == "reconciler" else ["serve", one.name]
        assert list(one.argv[1:5])[: 2 + len(does)] == ["-m", "pipelines.cli", *does]
        assert one.env == {"SDN_PART_OF": str(stack.folder), "SDN_PART": one.name}
    assert "--host" not in [argument for one in programs for argument in one.argv]
    assert next(one for one in programs if one.name == "worker").stop_s > 100
    config = stack.keeper.config(programs)
    text = str({name: dict(config[name]) for name in config})
    env = stack.client_env(plan, Settings())
    for secret in (env["AWS_SECRET_ACCESS_KEY"], LOGIN.partition(":")[2]):
        assert secret not in text


def test_supervisor_fills_nothing_into_a_path(tmp_path):
    """A percent sign is one; what would end a line of its file is refused."""
    keeper = Keeper(tmp_path, tmp_path / "s.sock")

    def config(argument):
        kept = Kept(name="a", argv=["run", argument], env={}, start_s=1, stop_s=1)
        return keeper.config([kept])["program:a"]["command"]

    assert config("100%") == "run 100%%"
    with pytest.raises(ValueError, match="rename"):
        config("a ; b")


def test_a_port_in_use_is_told_before_anything_starts():
    """With the option that names another port."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            PortError, match=rf"port {port} for Prefect is in use by .*--prefect-port"
        ):
            stack_life._check_ports(Plan(ports=Ports(s3=0, mlflow=0, prefect=port)))


def test_a_port_of_another_stack_is_told_as_that(monkeypatch):
    """With the command that ends the other one."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(
            stack_life, "_mark_of", lambda pid: Marked(None, "/there/stack", "s3", None)
        )
        with pytest.raises(PortError, match=r"SDN_STACK=/there/stack sdn down.*--s3-port"):
            stack_life._check_ports(Plan(ports=Ports(s3=port, mlflow=0, prefect=0)))


def test_two_commands_at_once_are_told(stack):
    """The second says so and changes nothing."""
    with stack_life.only_one(stack), pytest.raises(stack_life.StackError, match="at work"):
        stack_life.bring_down(stack, Settings(), print)


def test_a_stack_that_never_was_has_nothing_to_end(stack):
    """`down` is no error then."""
    assert not stack_life.bring_down(stack, Settings(), print)


@pytest.mark.parametrize(
    ("state", "pid", "why", "expected"),
    [
        ("RUNNING", 7, "", "healthy"),
        ("RUNNING", 7, "no answer", "not healthy"),
        ("STARTING", 7, "no answer", "starting"),
        ("STARTING", 7, "", "healthy"),
        ("BACKOFF", 0, "no process", "starting"),
        ("FATAL", 0, "no process", "gone"),
    ],
)
def test_what_a_part_is_called(monkeypatch, stack, state, pid, why, expected):
    """By its process and its answer; the supervisor's own words stand beside."""
    names = Plan().parts
    found = state_of(monkeypatch, stack, {n: kept(n, state, pid) for n in names}, why)
    assert {part.state for part in found.parts} == {expected}
    assert found.healthy is (expected == "healthy")
    if why:
        assert all("words" in part.why for part in found.parts)


def test_parts_without_their_supervisor_are_not_healthy(monkeypatch, stack):
    """They may answer, but nobody starts them again."""
    found = state_of(monkeypatch, stack, None, "")
    assert not found.kept
    assert not found.healthy
    assert found.as_dict()["supervisor"] is False


def test_a_folder_of_somebody_else_is_refused(stack, monkeypatch):
    """Sockets lie where everybody may write: only in a folder that is ours."""
    monkeypatch.setattr(os, "getuid", lambda: Path("/").stat().st_uid + 1)
    stack.__dict__.pop("runtime", None)
    stack.runtime.mkdir()
    with pytest.raises(ValueError, match="somebody else"):
        stack.prepare(Plan(), Settings())


def test_flow_runs_are_cancelled_before_their_stack_ends(stack, monkeypatch):
    """Prefect is asked as its page asks, and waited for, so that no run stays Running for ever."""
    stack.prepare(Plan(), Settings())
    asked, states = [], {"f1": "CANCELLED", "f2": "CANCELLING"}

    def ask(self, method, path, content=None, *, absent=None):
        asked.append((method, path, content and content["state"]["type"]))
        return {"state_type": states[path.rpartition("/")[2]]} if method == "GET" else {}

    monkeypatch.setattr(stack_life.PrefectApi, "ask", ask)
    monkeypatch.setattr(stack_life.time, "sleep", lambda seconds: None)
    stack_life._cancel(stack, Settings(), ["f1", "f2"])
    assert [one for one in asked if one[0] == "POST"] == [
        ("POST", "flow_runs/f1/set_state", "CANCELLING"),
        ("POST", "flow_runs/f2/set_state", "CANCELLING"),
        # Its process was gone before anybody could say how it had ended.
        ("POST", "flow_runs/f2/set_state", "CANCELLED"),
    ]


def test_a_prefect_that_is_gone_keeps_no_stack_from_ending(stack):
    """Flow runs' processes are ended all the same."""
    stack.prepare(Plan(ports=Ports(prefect=1)), Settings())
    stack_life._cancel(stack, Settings(), ["f1"])

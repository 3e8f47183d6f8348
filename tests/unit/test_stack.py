"""The local stack: where it is, what its processes and users are told, what state it is in."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import stack_life, stack_state
from pipelines.keeping import Keeper, Kept, KeptState
from pipelines.marks import Marked
from pipelines.ports import HOST, PortError
from pipelines.settings import Settings, known_variables
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


def test_a_shell_that_sources_the_file_again_has_nothing_of_an_earlier_start(stack, monkeypatch):
    """Login and Ray of a start that had them are gone after one that has not."""
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    stack.prepare(Plan(ray=True), Settings())
    earlier = stack.folder / "earlier.sh"
    stack.env_file.rename(earlier)
    monkeypatch.delenv("SDN_AUTH")
    stack.prepare(Plan(), Settings())
    sourced = " && ".join(f". {shlex.quote(str(path))}" for path in (earlier, stack.env_file))
    done = subprocess.run(
        ["sh", "-c", f"{sourced} && env"],
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    env = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert env["SDN_STACK"] == str(stack.folder)
    assert [name for name, value in env.items() if "RAY" in name or LOGIN in value] == []
    assert [name for name in env if name.startswith("MLFLOW_TRACKING_U")] == ["MLFLOW_TRACKING_URI"]
    assert "MLFLOW_TRACKING_PASSWORD" not in env


def test_a_new_terminal_knows_the_login(stack, monkeypatch):
    """That of the last start; one that is set counts first, and without one there is none."""
    assert stack.with_login(Settings()).auth is None
    stack.prepare(Plan(), Settings())
    assert stack.with_login(Settings()).auth is None
    login = "anna:it's a $login; of # tests"
    monkeypatch.setenv("SDN_AUTH", login)
    stack.prepare(Plan(), Settings())
    monkeypatch.delenv("SDN_AUTH")
    assert stack.with_login(Settings()).credentials == tuple(login.split(":"))
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    assert stack.with_login(Settings()).credentials == tuple(LOGIN.split(":"))


def test_a_shell_with_another_tmpdir_finds_the_supervisor(stack, monkeypatch, tmp_path):
    """Its socket is where it was made, until the stack has ended."""
    stack.prepare(Plan(), Settings())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Stack(stack.folder).runtime == stack.runtime
    stack.clear_runtime()
    assert Stack(stack.folder).runtime.parent == tmp_path


def test_every_setting_reaches_the_parts(stack, monkeypatch):
    """But for what the stack itself decides, and for what concerns a single command."""
    stack.prepare(Plan(), Settings())
    decided = {"SDN_STORE", "SDN_CACHE", "SDN_STACK", "SDN_S3_ENDPOINT", "SDN_TRACKING_URI"}
    decided |= {"SDN_RAY_ADDRESS", "SDN_DATABASE", "SDN_PART", "SDN_PART_OF"}
    others = {"SDN_ORDER", "SDN_CHAOS", "SDN_CHAOS_SEED", "SDN_PICTURES"}
    given = dict.fromkeys(known_variables(), "given")
    env = stack.env(Plan(), Settings(), given)
    assert {name for name in given if env.get(name) != "given"} == decided | others


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
        assert {"SDN_PART_OF": str(stack.folder), "SDN_PART": one.name}.items() <= one.env.items()
        assert len(one.env) == {"ray": 3, "prefect": 4}.get(one.name, 2)
    # A new server begins without its blocks, which come later; one that has them looks itself.
    blocks = {
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
        "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    }
    assert blocks.items() <= next(one for one in programs if one.name == "prefect").env.items()
    (stack.folder / "prefect-home" / "prefect.db").touch()
    again = next(one for one in stack.programs(plan, Settings()) if one.name == "prefect")
    assert blocks.keys().isdisjoint(again.env)
    # What Ray leaves among temporary files goes with the stack.
    tmp = Path(next(one for one in programs if one.name == "ray").env["TMPDIR"])
    assert tmp.is_dir()
    assert tmp.parent == stack.runtime
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


def test_ports_in_use_are_told_before_anything_starts():
    """All of them, each with the option that names another port."""
    with socket.socket() as one, socket.socket() as two:
        ports = []
        for taken in (one, two):
            taken.bind((HOST, 0))
            taken.listen()
            ports.append(taken.getsockname()[1])
        mlflow, prefect = ports
        with pytest.raises(PortError) as refused:
            stack_life._check_ports(Plan(ports=Ports(s3=0, mlflow=mlflow, prefect=prefect)))
    said = str(refused.value).splitlines()
    assert len(said) == 2
    for line, name, port in zip(said, ("MLflow", "Prefect"), ports, strict=True):
        assert line.startswith(f"port {port} for {name} is in use by ")
        assert f"--{name.lower()}-port {port + 1}" in line


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


@pytest.mark.parametrize(
    ("looked_s_ago", "healthy"), [(1, True), (-1, True), (5000, False), (None, False)]
)
def test_a_reconciler_is_healthy_while_it_looks(monkeypatch, looked_s_ago, healthy):
    """By its word at Prefect's server; one of before its process began is another's."""
    now, began = 1_000_000.0, 1_000_000.0 - 10_000

    def ask(api, method, path, content=None, *, absent=None):
        assert (method, path) == ("GET", "variables/name/sdn_reconciler")
        at = None if looked_s_ago is None else datetime.fromtimestamp(now - looked_s_ago, UTC)
        return absent if at is None else {"updated": at.isoformat()}

    monkeypatch.setattr(stack_state.PrefectApi, "ask", ask)
    monkeypatch.setattr(stack_state.time, "time", lambda: now)
    monkeypatch.setattr(
        stack_state.psutil, "Process", lambda pid: SimpleNamespace(create_time=lambda: began)
    )
    probe = stack_state.Probe(Plan(), Settings())
    assert (probe.unhealthy("reconciler", 7) == "") is healthy
    began = now - 0.5
    assert (probe.unhealthy("reconciler", 7) == "") is (looked_s_ago == -1)


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
    asked, states = [], {"f1": "CRASHED", "f2": "CANCELLING", "f3": "COMPLETED"}

    def ask(self, method, path, content=None, *, absent=None):
        asked.append((method, path, content and content["state"]["type"]))
        if content and content["state"]["type"] == "CANCELLED":
            assert "Retry" in content["state"]["message"]
        return {"state_type": states[path.rpartition("/")[2]]} if method == "GET" else {}

    monkeypatch.setattr(stack_life.PrefectApi, "ask", ask)
    monkeypatch.setattr(stack_life.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(stack_life, "marked", lambda folder: [])
    stack_life._cancel(stack, Settings(), ["f1", "f2", "f3"])
    assert [one for one in asked if one[0] == "POST"] == [
        ("POST", "flow_runs/f1/set_state", "CANCELLING"),
        ("POST", "flow_runs/f2/set_state", "CANCELLING"),
        ("POST", "flow_runs/f3/set_state", "CANCELLING"),
        # The one was cut off while it ended, the other's process was gone before it could say how.
        ("POST", "flow_runs/f1/set_state", "CANCELLED"),
        ("POST", "flow_runs/f2/set_state", "CANCELLED"),
    ]


def test_a_prefect_that_is_gone_keeps_no_stack_from_ending(stack):
    """Flow runs' processes are ended all the same."""
    stack.prepare(Plan(ports=Ports(prefect=1)), Settings())
    stack_life._cancel(stack, Settings(), ["f1"])


class Machine:
    """Processes, a supervisor and a Prefect server that end what they are told to end."""

    def __init__(self, monkeypatch, stack, processes):
        self.left, self.did = dict(enumerate(processes)), []
        self.paused, self.queued = False, ["f2"]
        for name in ("listens", "_check_ports"):
            monkeypatch.setattr(stack_life, name, lambda *a, **k: None)
        monkeypatch.setattr(stack_life, "marked", lambda folder: self.marked())
        monkeypatch.setattr(stack_life, "end", lambda processes, grace_s: self.end(processes))
        monkeypatch.setattr(stack_life.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(
            stack_life.PrefectApi, "ask", lambda api, *asked, absent=None: self.ask(*asked)
        )
        monkeypatch.setattr(Keeper, "states", lambda keeper: None)
        monkeypatch.setattr(Keeper, "start", lambda keeper, programs, env: self.start())
        monkeypatch.setattr(Keeper, "stop", lambda keeper, part: self.stop(part))
        stack.prepare(Plan(), Settings())

    def marked(self):
        return [
            Marked(SimpleNamespace(pid=pid), "", part, run)
            for pid, (part, run) in self.left.items()
        ]

    def start(self):
        self.left |= {100: ("supervisor", None), 101: ("worker", None), 102: ("worker", "f9")}

    def stop(self, part):
        self.did.append(f"{part} ends")
        self.left = {k: v for k, v in self.left.items() if v != (part, None)}

    def end(self, processes):
        for one in processes:
            self.did.append(" ".join(filter(None, self.left.pop(one.pid, ["again"]))) + " ends")
        return []

    def ask(self, method, path, content=None):
        if path.startswith("work_pools"):
            if method == "PATCH":
                self.paused = content["is_paused"]
                self.did.append(f"pool paused: {self.paused}")
            return {"is_paused": self.paused}
        run = path.split("/")[1]
        if method == "GET":
            return {"state_type": "CANCELLED"}
        if content["state"]["type"] == "CANCELLED":  # the last word of it
            return {}
        self.did.append(f"{run} cancelled")
        self.left = {k: v for k, v in self.left.items() if v[1] != run}
        if not self.paused and self.queued:  # a slot is free
            self.left[200] = ("worker", self.queued.pop())
        return {}


def test_an_ending_stack_begins_no_flow_run(stack, monkeypatch):
    """The pool is paused before a run is cancelled, and goes on once the worker has ended."""
    machine = Machine(monkeypatch, stack, [("worker", None), ("worker", "f1"), ("s3", None)])
    assert stack_life.bring_down(stack, Settings(), print)
    assert machine.did == [
        "pool paused: True",
        "f1 cancelled",
        "worker ends",
        "pool paused: False",
        "s3 ends",
    ]
    assert machine.queued == ["f2"]
    assert not stack.paused.exists()


def test_a_pool_that_was_paused_stays_so(stack, monkeypatch):
    """Somebody wanted that; a run that was just beginning is cancelled all the same."""
    machine = Machine(monkeypatch, stack, [("worker", "f1")])
    machine.paused = True
    ask = machine.ask

    def slow(method, path, content=None):
        if "f1/set_state" in path and content["state"]["type"] == "CANCELLING":
            machine.left[200] = ("worker", "f2")
        return ask(method, path, content)

    monkeypatch.setattr(machine, "ask", slow)
    stack_life.bring_down(stack, Settings(), print)
    assert machine.did == ["f1 cancelled", "f2 cancelled", "worker ends"]
    assert machine.paused


def test_a_pool_that_a_killed_end_left_paused_goes_on(stack, monkeypatch):
    """The next start finds the note of it, and resumes the pool once."""
    machine = Machine(monkeypatch, stack, [])
    machine.paused = True
    stack.paused.touch()
    monkeypatch.setattr(stack_life, "_wait", lambda *a, new: None)
    stack_life.bring_up(stack, Plan(), Settings(), print)
    assert machine.did == ["pool paused: False"]
    assert not stack.paused.exists()


def test_a_start_that_fails_ends_what_it_started_alone(stack, monkeypatch):
    """A flow run that outlived an earlier stack goes on; one of the new worker does not."""
    machine = Machine(monkeypatch, stack, [("worker", "f1"), ("mlflow", None)])
    heard = []

    def fails(*_, new):
        raise stack_life.StackError("mlflow does not start")

    def say(text):
        heard.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr(stack_life, "_wait", fails)
    with pytest.raises(stack_life.StackError, match="does not start"):
        stack_life.bring_up(stack, Plan(), Settings(), say)
    assert [one.flow_run for one in machine.marked()] == ["f1"]
    assert "f9 cancelled" in machine.did
    # A second Ctrl-C would leave half a stack.
    assert heard[-1] is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


FOLLOWS = """
import fcntl, signal, termios, time
from pathlib import Path
from pipelines import stack_commands, stack_life

def follow(stack, say):
    Path("follows").touch()
    time.sleep(60)

def bring_down(stack, settings, say):
    say("ends")
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.raise_signal(one)
    say("ended")
    Path("ended").touch()

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
# Tests under nohup would hand on that it is ignored, which a stack keeps to.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
stack_life.bring_up = lambda *a: None
stack_life.follow, stack_life.bring_down = follow, bring_down
stack_commands.up()
"""


@pytest.mark.parametrize("closed", [True, False])
def test_a_closed_terminal_ends_the_stack_as_ctrl_c_does(tmp_path, closed):
    """That nobody hears what is said, and that more signals come, changes nothing."""
    terminal, inside = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(Path(stack_life.__file__).parents[1])}
    up = subprocess.Popen(
        [sys.executable, "-c", FOLLOWS], cwd=tmp_path, env=env, start_new_session=True,
        stdin=inside, stdout=inside, stderr=inside,
    )  # fmt: skip
    os.close(inside)
    try:
        while not (tmp_path / "follows").exists():
            assert up.poll() is None, os.read(terminal, 9999)
            time.sleep(0.02)
        if closed:
            os.close(terminal)
        else:
            os.write(terminal, b"\x03")
        assert up.wait(30) == 0
        assert (tmp_path / "ended").exists()
    finally:
        up.kill()
        up.wait()
        if not closed:
            os.close(terminal)

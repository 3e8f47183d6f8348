"""`sdn doctor`: each usual misconfiguration, made on purpose, fails exactly its own line."""

from __future__ import annotations

import base64
import copy
import json
import platform
import resource
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from types import SimpleNamespace

import psutil
import pytest

from pipelines.diagnosis import clusters, flow_server, machine, packages, places, tracking_server
from pipelines.diagnosis.check import guarded
from pipelines.diagnosis.environment import look_at_environment, malformed, readable
from pipelines.diagnosis.notices import look_at_notices
from pipelines.settings import Settings
from sdn.recipes import recipe


def failing(checks):
    """Names of the lines that fail; each of them says what to do."""
    found = [check for check in checks if not check.ok]
    assert all(check.remedy for check in found)
    return [check.what for check in found]


def remedies(checks):
    return " ".join(check.remedy for check in checks if not check.ok)


@contextmanager
def answering(answers, *, date=None, wants=""):
    """A server on 127.0.0.1 with these answers by path: (status, text or JSON); else 404. Of a
    request whose Authorization is not the one it `wants` it answers 401."""

    class Handler(BaseHTTPRequestHandler):
        def _any(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            below = (a for n, a in answers.items() if n[-1] == "*" and path.startswith(n[:-1]))
            status, content = answers.get(path) or next(below, (404, "no such page"))
            if wants and self.headers.get("Authorization") != wants:
                status, content = 401, "no"
            body = content if isinstance(content, str) else json.dumps(content)
            self.send_response_only(status)
            self.send_header("Date", date or formatdate(usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = do_PUT = do_DELETE = _any  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No variable of the machine that runs the tests takes part."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy",
                 "OMP_NUM_THREADS", "SDN_CPUS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


# The machine.


def test_this_machine_is_looked_at(tmp_path):
    """Every line has a name and says what was found."""
    found = list(machine.look_at_machine(Settings(store=str(tmp_path))))
    assert [check.what for check in found][:2] == ["memory", "disk"]
    assert all(check.found for check in found)


@pytest.fixture
def roomy(monkeypatch):
    """A machine with enough of everything."""
    disk = {"free": 100 * 2**30}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * 2**30))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: SimpleNamespace(**disk))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 65536))
    return monkeypatch


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda patch: None, []),
        (lambda patch: patch.setattr(psutil, "virtual_memory",
                                     lambda: SimpleNamespace(available=2**30)), ["memory"]),
        (lambda patch: patch.setattr(machine.shutil, "disk_usage", lambda place: SimpleNamespace(
            free=2**30 if place != machine._SHM else 2**33)), ["disk"]),
        (lambda patch: patch.setattr(machine.shutil, "disk_usage", lambda place: SimpleNamespace(
            free=2**40 if place != machine._SHM else 2**26)), ["shared memory"]),
        (lambda patch: patch.setenv("SDN_CPUS", "5000"), ["cores"]),
        (lambda patch: patch.setattr(resource, "getrlimit", lambda which: (256, 1024)),
         ["open files"]),
    ],
    ids=["nothing", "memory", "disk", "shared memory", "SDN_CPUS", "descriptors"],
)  # fmt: skip
def test_what_a_machine_lacks(roomy, tmp_path, change, line):
    """Too little of one thing fails that line alone."""
    change(roomy)
    assert failing(machine.look_at_machine(Settings(store=str(tmp_path)))) == line


@pytest.mark.parametrize(
    ("name", "value", "line", "said"),
    [
        ("SDN_STORE", "runs", [], ""),
        ("SDN_TRACKNG_URI", "http://x", ["variables"], "SDN_TRACKING_URI"),
        ("SDN_SOMETHING_ELSE", "x", ["variables"], "nothing reads it"),
        ("HTTP_PROXY", "http://proxy:3128", ["proxies"], "HTTP_PROXY catches 127.0.0.1"),
        ("ALL_PROXY", "http://proxy:3128", ["proxies"], "ALL_PROXY"),
        ("OMP_NUM_THREADS", "5000", ["threads"], "OMP_NUM_THREADS=5000"),
        ("OMP_NUM_THREADS", "many", ["threads"], "OMP_NUM_THREADS=many"),
    ],
)
def test_variables_that_mislead(monkeypatch, name, value, line, said):
    """A misspelt name with the nearest one, a proxy before this machine, too many threads."""
    monkeypatch.setenv(name, value)
    found = list(look_at_environment(Settings()))
    assert failing(found) == line
    assert said in " ".join(check.found for check in found)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("SDN_CPUS", "two", "SDN_CPUS"),
        ("SDN_CPUS", "0", "SDN_CPUS"),
        ("SDN_SILENCE_S", "5", "SDN_SILENCE_S"),
        ("SDN_GPU", "perhaps", "SDN_GPU"),
        ("SDN_AUTH", "anna", "SDN_AUTH"),
        ("SDN_AUTH", "anna:short", "SDN_AUTH"),
    ],
)
def test_variables_that_cannot_be_read(monkeypatch, tmp_path, name, value, line):
    """Each is a line of its own; the doctor goes on with its default and looks at all the rest."""
    from pipelines import diagnosis

    monkeypatch.setenv(name, value)
    found = list(malformed())
    assert failing(found) == [line]
    assert name in remedies(found)
    assert value not in " ".join(check.found for check in found)
    assert readable(str(tmp_path)).store == str(tmp_path)
    monkeypatch.setattr(diagnosis, "look_at_device", lambda settings: [])  # loads torch
    everything = {check.what: check.ok for check in diagnosis.diagnose(str(tmp_path))}
    assert everything[line] is False
    assert {"memory", "store", "Ray", "notices"} <= set(everything)


def test_a_proxy_that_lets_this_machine_alone(monkeypatch):
    """With NO_PROXY it is no finding."""
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    assert failing(look_at_environment(Settings())) == []


def test_packages_that_do_not_work_together(monkeypatch):
    """A missing one says how to get it, one too new says why not."""
    monkeypatch.setattr(packages, "_NEEDED", {"no-such-package": "pipeline"})
    monkeypatch.setattr(packages, "_BELOW", (("numpy", (1, 0), "a reason"),))
    found = list(packages.look_at_packages())
    assert failing(found) == ["no-such-package", "numpy"]
    assert "sdn[pipeline]" in remedies(found)
    assert "a reason" in remedies(found)


# The places.


def test_an_endpoint_without_a_scheme():
    """It is named with one."""
    found = list(places.look_at_store(Settings(store="s3://data/x", s3_endpoint="localhost:8333")))
    assert failing(found) == ["store"]
    assert "http://localhost:8333" in remedies(found)


def test_a_store_that_cannot_be_written(tmp_path):
    """A file where a folder should be."""
    (tmp_path / "file").write_text("")
    assert failing(places.look_at_store(Settings(store=str(tmp_path / "file" / "x")))) == ["store"]
    assert failing(places.look_at_store(Settings(store=str(tmp_path / "store")))) == []


@pytest.mark.parametrize(("ahead", "line"), [(0, []), (3600, ["clock"]), (-3600, ["clock"])])
def test_clocks_that_are_apart(ahead, line):
    """The server's clock, an hour ahead or behind, is a finding."""
    with answering({}, date=formatdate(time.time() + ahead, usegmt=True)) as url:
        apart = places.seconds_apart(url)
    assert apart == pytest.approx(ahead, abs=5)
    assert failing([places.clock(apart, url)]) == line


class Landing(Settings):
    """Settings with a landing place."""

    landing: str | None = None


def test_a_landing_place_that_cannot_be_read(tmp_path):
    """A folder that is not there; one that is there is fine, and none is no line."""
    (tmp_path / "in").mkdir()
    there = Landing(store=str(tmp_path / "store"), landing=str(tmp_path / "in"))
    gone = Landing(store=str(tmp_path), landing=str(tmp_path / "gone"))
    assert failing(places.look_at_landing(there)) == []
    assert failing(places.look_at_landing(gone)) == ["landing place"]
    assert list(places.look_at_landing(Landing(store=str(tmp_path)))) == []


def test_a_data_set_that_cannot_grow(tmp_path):
    """One inside its landing place, and one that cannot be written; nothing is made by looking."""
    landing = tmp_path / "in"
    landing.mkdir()
    (tmp_path / "file").touch()

    def lines(dataset):
        given = Settings(store=str(tmp_path), landing=str(landing), dataset=str(dataset))
        return list(places.look_at_landing(given))

    assert failing(lines(tmp_path / "set" / "deep")) == []
    assert not (tmp_path / "set").exists()
    inside = lines(landing / "set")
    assert failing(inside) == ["data set"]
    assert "one inside the other" in remedies(inside)
    refused = lines(tmp_path / "file" / "set")
    assert failing(refused) == ["data set"]
    assert "SDN_DATASET" in remedies(refused)


# Notices.


@pytest.mark.parametrize(
    ("changes", "line", "said"),
    [
        ({}, [], ""),
        ({"notify_command": "cat -"}, [], ""),
        ({"notify_command": "no-such-program --secret x"}, ["notices by command"], "chmod"),
        ({"notify_command": "/etc/passwd"}, ["notices by command"], "chmod"),
        ({"notify_command": "tee 'half"}, ["notices by command"], "quotes"),
        ({"notify_url": "https://hooks.example/T000/secret"}, [], ""),
        ({"notify_url": "hooks.example/T000/secret"}, ["notices by URL"], "https://"),
    ],
)
def test_notices_that_would_not_arrive(changes, line, said):
    """A command that cannot be run, an address without a scheme; neither is repeated."""
    found = list(look_at_notices(Settings(**changes)))
    assert failing(found) == line
    assert said in remedies(found)
    assert "secret" not in "".join(check.found + check.remedy for check in found)


# Prefect.

WORKER = {"name": "w", "status": "ONLINE"}
QUEUE = {"name": "default", "is_paused": False, "concurrency_limit": None}
TRAINING = {"name": "training", "is_paused": False, "concurrency_limit": 1}


def healthy():
    """What a server answers on which everything stands."""
    deployed = [
        {
            "name": name,
            "version": found,
            "paused": False,
            "schedules": [],
            "global_concurrency_limit": {"name": f"deployment:{name}", "limit": 1},
        }
        for name, found in flow_server.expected_deployments().items()
    ]
    deployed[0]["schedules"] = [{"active": True}]
    leases = "prefect.server.concurrency.lease_storage.filesystem"
    looked = {"value": {"host": "h"}, "updated": "2026-11-26T08:00:00+00:00"}
    return {
        "/api/health": (200, "true"),
        "/api/admin/version": (200, json.dumps(version("prefect"))),
        "/api/admin/settings": (200, {"server": {"concurrency": {"lease_storage": leases}}}),
        "/api/work_pools/sdn": (
            200, {"name": "sdn", "type": "process", "is_paused": False, "concurrency_limit": None}
        ),
        "/api/work_pools/sdn/workers/filter": (200, [WORKER]),
        "/api/work_pools/sdn/queues/filter": (200, [QUEUE, TRAINING]),
        "/api/deployments/filter": (200, deployed),
        "/api/flow_runs/filter": (200, []),
        "/api/variables/name/sdn_reconciler": (200, looked),
    }  # fmt: skip


NOW = "Thu, 26 Nov 2026 08:00:09 GMT"


def prefect(monkeypatch, answers, *, path="/api", date=NOW, wants="", **known):
    """The lines about a server with these answers, for one who has `known` credentials."""
    with answering(answers, date=date, wants=wants) as url:
        from prefect.settings import temporary_settings

        known = {f"api.{name}": known.get(name) for name in ("auth_string", "key")}
        with temporary_settings({"api.url": url + path, **known}):
            return list(flow_server.look_at_prefect(Settings()))


def changed(path, *keys, to):
    """A change of one value in an answer."""

    def change(answers):
        status, content = answers[f"/api/{path}"]
        content = copy.deepcopy(content)
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to
        answers[f"/api/{path}"] = status, content

    return change


def answered(path, status, content):
    """Another answer."""
    return lambda answers: answers.update({f"/api/{path}": (status, content)})


MEMORY = "prefect.server.concurrency.lease_storage.memory"


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (lambda answers: None, [], ""),
        (answered("admin/version", 200, '"3.2.1"'), ["Prefect version"], "prefect==3.2.1"),
        (changed("admin/settings", "server", "concurrency", "lease_storage", to=MEMORY),
         ["Prefect slots"], "filesystem"),
        (answered("work_pools/sdn", 404, {}), ["Prefect pool", "Prefect worker"],
         "sdn deploy --pool sdn"),
        (changed("work_pools/sdn", "is_paused", to=True), ["Prefect pool"], "work-pool resume"),
        (changed("work_pools/sdn", "concurrency_limit", to=0), ["Prefect pool"],
         "sdn deploy --runs 4"),
        (changed("work_pools/sdn", "type", to="docker"), ["Prefect pool's type"],
         "sdn deploy --type process"),
        (answered("work_pools/sdn/workers/filter", 200, [WORKER | {"status": "OFFLINE"}]),
         ["Prefect worker"], "sdn serve worker --pool sdn --type process"),
        (changed("work_pools/sdn/queues/filter", 0, "concurrency_limit", to=0),
         ["Prefect queues"], "work-queue clear-concurrency-limit default"),
        (changed("work_pools/sdn/queues/filter", 1, "concurrency_limit", to=0),
         ["Prefect queues"], "sdn deploy --trainings 1"),
        (changed("work_pools/sdn/queues/filter", 1, "concurrency_limit", to=None),
         ["Prefect queues"], "sdn deploy --trainings 1"),
        (answered("work_pools/sdn/queues/filter", 200, [QUEUE]),
         ["Prefect queues"], "sdn deploy --trainings 1"),
        (changed("work_pools/sdn/queues/filter", 0, "is_paused", to=True),
         ["Prefect queues"], "work-queue resume default"),
        (answered("deployments/filter", 200, []), ["Prefect deployments"], "sdn deploy"),
        (changed("deployments/filter", 0, "version", to="0123456789ab"),
         ["Prefect deployments"], "sdn deploy"),
        (changed("deployments/filter", 0, "version", to=None),
         ["Prefect deployments"], "sdn deploy"),
        (changed("deployments/filter", 0, "global_concurrency_limit", "limit", to=0),
         ["Prefect deployments"], "update deployment:sdn-pipeline --limit 1"),
        (changed("deployments/filter", 0, "paused", to=True), ["Prefect schedules"], "resume"),
        (changed("deployments/filter", 0, "schedules", 0, "active", to=False),
         ["Prefect schedules"], "resume"),
        (answered("flow_runs/filter", 200, [{"name": "owl"}]), ["Prefect late runs"], "waits"),
        (answered("variables/name/sdn_reconciler", 404, {}), ["reconciler"], "sdn reconcile"),
        (changed("variables/name/sdn_reconciler", "updated", to="2026-11-26T07:50:00+00:00"),
         ["reconciler"], "sdn reconcile"),
        (answered("health", 401, "no"), ["Prefect"], "PREFECT_API_AUTH_STRING"),
    ],
    ids=["nothing", "version", "leases", "no pool", "paused pool", "pool limit 0",
         "pool of another type", "no worker", "queue limit 0", "no training allowed",
         "trainings without a limit", "no queue of trainings", "paused queue", "not deployed",
         "older code", "deployed by hand", "deployment limit 0", "paused",
         "inactive schedule", "late", "no reconciler", "reconciler gone", "refused"],
)  # fmt: skip
def test_a_prefect_server_that_lacks_something(monkeypatch, change, line, said):
    """One thing missing or closed fails its own line, with the command that mends it."""
    answers = healthy()
    change(answers)
    found = prefect(monkeypatch, answers)
    assert failing(found) == line
    assert said in remedies(found)


@pytest.mark.parametrize(
    ("known", "line"),
    [
        ({"auth_string": "anna:a-password-of-tests"}, []),
        ({"auth_string": "anna:another"}, ["Prefect"]),
        ({"key": "a-key-of-tests"}, ["Prefect"]),
        ({}, ["Prefect"]),
    ],
    ids=["the login", "another", "a key", "none"],
)
def test_a_prefect_server_with_a_login(monkeypatch, known, line):
    """It is asked with the credentials that Prefect's own client would use."""
    wants = "Basic " + base64.b64encode(b"anna:a-password-of-tests").decode()
    assert failing(prefect(monkeypatch, healthy(), wants=wants, **known)) == line


def test_a_prefect_server_with_a_key(monkeypatch):
    """So is one with an API key, as Prefect Cloud."""
    found = prefect(monkeypatch, healthy(), wants="Bearer a-key-of-tests", key="a-key-of-tests")
    assert failing(found) == []


def test_a_worker_of_another_type(monkeypatch):
    """A worker of this machine starts no runs of a pool of another type, and says so nowhere."""
    word = "prefect worker start --pool {} --type {}".format
    lines = [["python", "-m", *word(*one).split()] for one in (("sdn", "kubernetes"), ("x", "y"))]
    running = [SimpleNamespace(info={"cmdline": line}) for line in [*lines, None, ["ls"]]]
    monkeypatch.setattr(psutil, "process_iter", lambda wanted: running)
    found = prefect(monkeypatch, healthy())
    assert failing(found) == ["Prefect pool's type"]
    assert "sdn deploy --type kubernetes" in remedies(found)


def test_an_address_without_api(monkeypatch):
    """The page of the server is taken for its API often enough to be named."""
    answers = healthy() | {"/health": (200, "<html>Prefect</html>")}
    found = prefect(monkeypatch, answers, path="")
    assert failing(found) == ["Prefect"]
    assert "/api" in remedies(found)


def test_no_prefect_server_there():
    """Nobody listens: one line, and nothing more is asked."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        found = list(flow_server.look_at_prefect(Settings()))
    assert failing(found) == ["Prefect"]
    assert len(found) == 1


# MLflow.


def mlflow(monkeypatch, changes):
    """The lines about a server with these answers."""
    place = {"experiment": {"artifact_location": "mlflow-artifacts:/0"}}
    answers = {
        "/health": (200, "OK"),
        "/version": (200, version("mlflow")),
        "/api/2.0/mlflow/experiments/get": (200, place),
        "/api/2.0/mlflow-artifacts/artifacts/*": (200, {}),
    }
    with answering(answers | changes) as url:
        return list(tracking_server.look_at_mlflow(Settings(tracking_uri=url)))


@pytest.mark.parametrize(
    ("changes", "line", "said"),
    [
        ({}, [], ""),
        ({"/version": (200, "2.1.0")}, ["MLflow version"], "mlflow==2.1.0"),
        ({"/api/2.0/mlflow/experiments/get": (401, "who?")}, ["MLflow"],
         "MLFLOW_TRACKING_USERNAME"),
        ({"/api/2.0/mlflow-artifacts/artifacts/*": (500, "read-only")}, ["MLflow artifacts"],
         "sdn serve mlflow --artifacts"),
        ({"/api/2.0/mlflow/experiments/get": (
            200, {"experiment": {"artifact_location": "file:///nowhere/at/all"}})},
         ["MLflow artifacts"], "sdn serve mlflow --artifacts"),
    ],
    ids=["nothing", "version", "refused", "not writable", "not writable from here"],
)  # fmt: skip
def test_an_mlflow_server_that_lacks_something(monkeypatch, changes, line, said):
    """Another version, no way in, nowhere to keep files: each its own line."""
    found = mlflow(monkeypatch, changes)
    assert failing(found) == line
    assert said in remedies(found)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, []),
        ({"ray_address": "10.0.0.1:6379"}, ["MLflow"]),
        ({"ray_address": "127.0.0.1:6379"}, []),
        ({"ray_address": "ray://head:10001"}, ["MLflow"]),
    ],
)
def test_sqlite_that_several_machines_share(tmp_path, monkeypatch, changes, line):
    """A file's database beside a cluster elsewhere is a finding; alone it is not."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    settings = Settings(store=str(tmp_path), **changes)
    assert failing(tracking_server.look_at_mlflow(settings)) == line


# Ray.


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ({}, []),
        ({"rayVersion": "1.2.3"}, ["Ray version"]),
        ({"pythonVersion": "3.8.1"}, ["Ray's Python"]),
    ],
)
def test_a_cluster_of_other_versions(about, line):
    """Ray and Python have to be the same on all nodes."""
    same = {"rayVersion": version("ray"), "pythonVersion": platform.python_version()}
    assert failing(clusters.versions(same | about)) == line


def test_a_cluster_with_too_few_cores():
    """Fewer than the ranks of a stage take."""
    config = recipe("tiny")
    assert failing([clusters.room(2, config)]) == []
    assert failing([clusters.room(1, config)]) == ["Ray cores"]


@pytest.mark.parametrize(("status", "line"), [(401, []), (403, []), (200, ["Ray's ports"])])
def test_a_cluster_without_a_token(status, line):
    """Ray's ports are open to the network: a cluster that tells anybody its jobs is a finding."""
    with answering({"/api/jobs/": (status, [])}) as url:
        found = clusters.guard(url)
    assert failing([found]) == line
    assert "sdn serve ray" in found.remedy


@pytest.mark.parametrize("answers", [None, {"/api/version": (401, "no token")}, {"/x": (200, "")}])
def test_a_cluster_that_cannot_be_asked(answers):
    """None there, one that refuses the token, one without a dashboard: one line, with all three."""
    with answering(answers or {}) as url:
        address = url if answers is not None else "http://127.0.0.1:9"
        found = list(clusters.look_at_ray(Settings(ray_address=address), recipe("tiny")))
    assert failing(found) == ["Ray"]
    assert "RAY_AUTH_TOKEN" in remedies(found)
    assert "sdn serve ray" in remedies(found)


def test_a_look_that_breaks_off_is_a_finding():
    """What was seen before it is kept, and the doctor goes on."""

    def look():
        yield from machine.look_at_device(Settings())
        raise RuntimeError("first line\nsecond")

    found = list(guarded("device", look))
    assert failing(found) == ["device"]
    assert found[-1].found == "first line"

"""`sdn deploy`: what is made where it is not there, and left alone where it is."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from pipelines import deploying
from pipelines.deploying import DeployError, Wanted, deploy, find_file, read_entries
from pipelines.prefect_api import LoginError, PrefectApi
from pipelines.settings import Settings

ROOT = Path(__file__).parents[2]


class Server:
    """As much of Prefect's server as deploying asks for."""

    def __init__(self):
        self.pools, self.queues, self.deployments = {}, {}, []
        self.changes = []
        self.login = None

    def __call__(self, request):  # noqa: PLR0911 (a table of routes)
        method, path = request.method, request.url.path.removeprefix("/api/")
        content = json.loads(request.content) if request.content else {}
        if path != "health" and self.login not in (None, request.headers.get("authorization")):
            return httpx.Response(401)
        if method in {"POST", "PATCH"} and not path.endswith("filter"):
            self.changes.append((method, path, content))
        match path.strip("/").split("/"):
            case ["health"]:
                return httpx.Response(200, json=True)
            case ["deployments", "filter"]:
                return httpx.Response(200, json=self.deployments)
            case ["deployments", *_]:
                return httpx.Response(204)
            case ["work_pools"]:
                self.pools[content["name"]] = content
                return httpx.Response(201, json=content)
            case ["work_pools", name]:
                return self.one(self.pools, name, content)
            case ["work_pools", _, "queues"]:
                self.queues[content["name"]] = content
                return httpx.Response(201, json=content)
            case ["work_pools", _, "queues", name]:
                return self.one(self.queues, name, content)
        raise AssertionError(path)

    def one(self, found, name, content):
        if name not in found:
            return httpx.Response(404)
        found[name] |= content
        return httpx.Response(200, json=found[name])


@pytest.fixture
def server(monkeypatch, tmp_path):
    """It, and what `prefect deploy` was given."""
    for name in ("SDN_AUTH", "SDN_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_API_URL", "http://server/api")
    monkeypatch.chdir(tmp_path)
    found = Server()

    def start(self, url, login=None):
        self.url = url
        self._client = httpx.Client(auth=login, transport=httpx.MockTransport(found))

    def run(settings, entries, loaded):
        names = {one["name"] for one in entries}
        kept = [one for one in found.deployments if one["name"] not in names]
        new = [
            {"id": f"id-{one['name']}", "name": one["name"], "version": one["version"],
             "paused": False, "schedules": []}
            for one in entries
        ]  # fmt: skip
        found.deployments = kept + new
        found.changes.append(("deploy", sorted(names)))

    monkeypatch.setattr(PrefectApi, "__init__", start)
    monkeypatch.setattr(deploying, "_run_prefect", run)
    return found


def go(**wanted):
    return deploy(Settings(), Wanted(**wanted), lambda text: None)


def test_all_is_made_once(server):
    """A pool and a queue of trainings with limits, and the deployments; again: nothing."""
    found = go()
    assert len(found["made"]) == 2
    assert found["deployed"] == found["deployments"]
    assert {"sdn-pipeline", "sdn-rollback"} <= set(found["deployments"])
    assert server.pools["sdn"]["concurrency_limit"] == 4
    assert server.queues["training"]["concurrency_limit"] == 1
    server.changes.clear()
    again = go()
    assert (again["made"], again["deployed"]) == ([], [])
    assert server.changes == []


def test_limits_that_a_person_has_set_stay(server):
    """Only a limit that is missing, or asked for, is set."""
    go()
    server.queues["training"]["concurrency_limit"] = 3
    server.pools["sdn"]["concurrency_limit"] = None
    go()
    assert server.queues["training"]["concurrency_limit"] == 3
    assert server.pools["sdn"]["concurrency_limit"] == 4
    go(trainings=2, runs=9)
    assert server.queues["training"]["concurrency_limit"] == 2
    assert server.pools["sdn"]["concurrency_limit"] == 9


def test_only_what_has_changed_is_deployed(server, tmp_path):
    """Another entry of the file, or another pool, is another version."""
    go()
    server.deployments[0]["version"] = "older"
    name = server.deployments[0]["name"]
    assert go()["deployed"] == [name]
    assert name in go(pool="other")["deployed"]


def test_what_was_paused_is_paused_again(server):
    """Deploying makes schedules and deployments active; a person had paused them."""
    go()
    cron = {"cron": "0 4 * * *"}
    first, second = server.deployments[:2]
    first |= {"version": "old", "schedules": [{"id": "s", "schedule": cron, "active": False}]}
    second |= {"version": "old", "paused": True}
    run = deploying._run_prefect

    def deployed(settings, entries, loaded):
        run(settings, entries, loaded)
        for one in server.deployments:
            one["schedules"] = [{"id": "n", "schedule": cron, "active": True}]

    server.changes.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploying, "_run_prefect", deployed)
        go()
    patches = [change for change in server.changes if change[0] == "PATCH"]
    assert patches == [
        ("PATCH", f"deployments/id-{first['name']}/schedules/n", {"active": False}),
        ("PATCH", f"deployments/id-{second['name']}", {"paused": True}),
    ]


def test_a_login_that_is_missing_or_wrong_is_told(server, monkeypatch):
    """What came and what to set; the password is not repeated."""
    monkeypatch.setenv("SDN_AUTH", "anna:a-password-of-tests")
    go()
    server.login = "Basic other"
    with pytest.raises(LoginError, match=r"another one came.*SDN_AUTH") as refused:
        go()
    assert "a-password" not in str(refused.value)
    monkeypatch.delenv("SDN_AUTH")
    with pytest.raises(LoginError, match="none came: SDN_AUTH is not set"):
        go()


def test_no_server_is_told(server, monkeypatch):
    """With what to start or to set."""
    monkeypatch.setattr(deploying, "_PATIENCE_S", 0)
    monkeypatch.setattr(PrefectApi, "healthy", lambda self: False)
    with pytest.raises(DeployError, match=r"sdn up.*PREFECT_API_URL"):
        go()


def test_the_deployments_are_found_anywhere(tmp_path, monkeypatch):
    """The one named, the folder's if it is this project's, else the project's own."""
    monkeypatch.chdir(tmp_path)
    assert find_file(None) == ROOT / "prefect.yaml"
    other = tmp_path / "prefect.yaml"
    other.write_text("name: somebody-elses\n")
    assert find_file(None) == ROOT / "prefect.yaml"
    other.write_text("name: sdn\n")
    assert find_file(None) == other
    with pytest.raises(DeployError, match="no deployments"):
        read_entries(other, "sdn")
    with pytest.raises(DeployError, match="--file"):
        find_file(tmp_path / "none.yaml")


def test_an_installed_project_has_its_deployments(tmp_path, monkeypatch):
    """A wheel puts them where no checkout is needed; without any it is told where was looked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deploying, "_ROOT", tmp_path / "site-packages")
    monkeypatch.setattr(deploying.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DeployError, match="share/sdn"):
        find_file(None)
    place = tmp_path / "share" / "sdn" / "prefect.yaml"
    place.parent.mkdir(parents=True)
    place.touch()
    assert find_file(None) == place


def test_flows_are_loaded_before_a_new_server_answers(server, monkeypatch):
    """Only where that was asked for; what was loaded and is not needed is ended."""
    began = []

    class Loading:
        ended = False

        def poll(self):
            return None

        def kill(self):
            self.ended = True

        wait = poll

    def start(settings, entries):
        assert entries
        began.append(Loading())
        return began[-1]

    monkeypatch.setattr(deploying, "_start_prefect", start)
    go()
    assert began == []
    go(early=True)
    (loading,) = began
    assert loading.ended

"""`sdn deploy`: what is made where it is not there, and left alone where it is."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import yaml

from pipelines import deploying
from pipelines.deployed import same_code
from pipelines.deploying import DeployError, Wanted, deploy, find_file, read_entries
from pipelines.prefect_api import LoginError, PrefectApi
from pipelines.settings import Settings

ROOT = Path(__file__).parents[2]


class Server:
    """As much of Prefect's server as deploying asks for."""

    def __init__(self):
        self.pools, self.queues, self.deployments, self.automations = {}, {}, [], []
        self.changes = []
        self.login = None

    def __call__(self, request):  # noqa: C901, PLR0911 (a table of routes)
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
                names = content.get("deployments", {}).get("name", {}).get("any_")
                found = [d for d in self.deployments if names is None or d["name"] in names]
                return httpx.Response(200, json=found)
            case ["automations", "related-to", of]:
                found = [one for one in self.automations if one["of"] == of]
                return httpx.Response(200, json=found)
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


def deployed(entry):
    """What the server says of an entry that was deployed."""
    limit = entry.get("concurrency_limit")
    return {
        "id": f"id-{entry['name']}",
        "name": entry["name"],
        "version": entry["version"],
        "work_pool_name": entry["work_pool"]["name"],
        "paused": False,
        "schedules": [
            {
                "id": f"schedule-{number}",
                "schedule": {
                    k: v for k, v in one.items() if k not in {"active", "parameters", "slug"}
                },
                "active": one["active"],
            }
            for number, one in enumerate(entry.get("schedules", []))
        ],
        "global_concurrency_limit": limit and {"limit": limit["limit"]},
    }


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
        found.deployments = kept + [deployed(one) for one in entries]
        for one in entries:
            of = f"prefect.deployment.id-{one['name']}"
            found.automations = [a for a in found.automations if a["of"] != of]
            found.automations += [
                {"of": of, "name": t["name"], "enabled": t["enabled"]}
                for t in one.get("triggers", [])
            ]
        found.given = {one["name"]: one for one in entries}
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


def older(server, name):
    """A deployment of earlier code, for a person to change."""
    (found,) = [one for one in server.deployments if one["name"] == name]
    what, _, rest = found["version"].partition("-")
    found["version"] = f"{'0' * len(what)}-{rest}"
    return found


def test_what_was_paused_is_paused_again(server):
    """Deploying resumes a deployment; a person had paused it."""
    go()
    name = "sdn-tune"
    for one in server.deployments[0], older(server, name):
        one["paused"] = True
    server.changes.clear()
    assert go()["deployed"] == [name]
    patches = [change for change in server.changes if change[0] == "PATCH"]
    assert patches == [("PATCH", f"deployments/id-{name}", {"paused": True})]


NIGHTLY = {"cron": "0 3 * * *", "timezone": "Europe/Berlin", "day_or": True}


def test_what_a_person_has_changed_is_deployed_as_it_is(server):
    """Schedules of any kind, the limit, and a trigger that is off, after a change of the code."""
    go()
    tune, retrain = older(server, "sdn-tune"), older(server, "sdn-retrain")
    every = {"interval": 3600.0, "anchor_date": "2026-01-01T00:00:00Z", "timezone": "UTC"}
    tune["schedules"] = [
        {"id": "a", "schedule": NIGHTLY, "active": True, "parameters": {"search_trials": 4}},
        {"id": "b", "schedule": every, "active": False, "slug": "hourly"},
    ]
    tune["global_concurrency_limit"] = {"limit": 2}
    retrain["schedules"] = [{"id": "c", "schedule": NIGHTLY, "active": False}]
    retrain["global_concurrency_limit"] = None
    (trigger,) = server.automations
    trigger["enabled"] = False
    assert go()["deployed"] == ["sdn-tune", "sdn-retrain"]
    given = server.given
    assert given["sdn-tune"]["schedules"] == [
        {**NIGHTLY, "parameters": {"search_trials": 4}, "active": True},
        {**every, "slug": "hourly", "active": False},
    ]
    assert given["sdn-tune"]["concurrency_limit"] == {"limit": 2, "collision_strategy": "ENQUEUE"}
    assert given["sdn-retrain"]["schedules"] == [{**NIGHTLY, "active": False}]
    assert "concurrency_limit" not in given["sdn-retrain"]
    assert [one["enabled"] for one in given["sdn-retrain"]["triggers"]] == [False]
    assert go()["deployed"] == []
    # A trigger that somebody removed does not come back.
    older(server, "sdn-retrain")
    server.automations.clear()
    go()
    assert server.given["sdn-retrain"]["triggers"] == []


def test_a_rhythm_that_the_file_changes_is_the_files(server, tmp_path):
    """New schedules, limits or triggers of a release reach a server that has the old ones."""
    go()
    older(server, "sdn-retrain")["schedules"] = []
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    (retrain,) = [one for one in content["deployments"] if one["name"] == "sdn-retrain"]
    retrain["schedules"][0]["cron"] = "9 * * * *"
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(content))
    assert go(file=file)["deployed"] == ["sdn-retrain"]
    assert server.given["sdn-retrain"]["schedules"] == retrain["schedules"]


def test_the_folder_belongs_to_a_deployment(server, tmp_path, monkeypatch):
    """Deployed from another folder, all runs are to begin there: nothing is left as it was."""
    monkeypatch.setenv("PWD", "/of/the/shell")
    names = go()["deployments"]
    place = server.given[names[0]]["work_pool"]["job_variables"]["working_dir"]
    assert place == str(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert go()["deployed"] == names
    assert server.given[names[0]]["work_pool"]["job_variables"] == {"working_dir": str(other)}
    assert go()["deployed"] == []
    here, there = read_entries(ROOT / "prefect.yaml", "sdn"), server.deployments
    monkeypatch.chdir(tmp_path)
    assert all(
        same_code(one["version"], two["version"]) for one, two in zip(here, there, strict=True)
    )


def test_deployments_whose_pool_was_deleted_are_deployed(server):
    """Without their pool they have no queue, whatever their version."""
    go()
    server.deployments[0]["work_pool_name"] = None
    assert go()["deployed"] == [server.deployments[-1]["name"]]


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

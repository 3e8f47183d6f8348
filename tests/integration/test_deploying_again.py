"""`sdn deploy` on a real Prefect server: what a person has changed there stays."""

from __future__ import annotations

import pytest

from pipelines import deploying
from pipelines.deploying import Wanted, deploy
from pipelines.prefect_api import PrefectApi
from pipelines.settings import Settings

pytestmark = pytest.mark.timeout(300)
NAMES = ("sdn-retrain", "sdn-rollback", "sdn-tune")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Prefect server of this test alone."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=90):
        monkeypatch.setenv("PREFECT_API_URL", PREFECT_API_URL.value())
        monkeypatch.delenv("SDN_AUTH", raising=False)
        monkeypatch.setenv("SDN_STORE", str(tmp_path / "store"))
        monkeypatch.chdir(tmp_path)
        with PrefectApi.of(Settings()) as api:
            yield api


def go(monkeypatch, code):
    monkeypatch.setattr(deploying, "_code_digest", lambda: code)
    return deploy(Settings(), Wanted(), lambda text: None)["deployed"]


def found(api):
    return {one["name"]: one for one in api.ask("POST", "deployments/filter", {})}


def rhythm(one):
    """All of a deployment that a person has changed, without what is new at each deploying."""
    schedules = [(s["schedule"], s["active"], s["parameters"], s["slug"]) for s in one["schedules"]]
    limit = one["global_concurrency_limit"]
    return schedules, limit and limit["limit"], one["paused"]


def test_what_a_person_has_changed_outlives_new_code(server, monkeypatch):
    """A nightly search, another cron, limits, a trigger that is off, a pause: none is lost."""
    read = deploying.read_entries

    def some(path, pool):
        return [one for one in read(path, pool) if one["name"] in NAMES]

    monkeypatch.setattr(deploying, "read_entries", some)
    assert sorted(go(monkeypatch, "old")) == list(NAMES)
    before = found(server)
    retrain, rollback, tune = (before[name]["id"] for name in NAMES)
    nightly = {"cron": "0 3 * * *", "timezone": "Europe/Berlin"}
    weekly = {"rrule": "FREQ=WEEKLY;BYDAY=MO", "timezone": "UTC"}
    every = {"interval": 7200, "anchor_date": "2026-01-01T00:00:00Z", "timezone": "UTC"}
    content = [
        {"schedule": nightly, "active": True, "parameters": {"search_trials": 4}},
        {"schedule": weekly, "active": False, "slug": "weekly"},
        {"schedule": every, "active": False},
    ]
    server.ask("POST", f"deployments/{tune}/schedules", content)
    server.ask("PATCH", f"deployments/{tune}", {"concurrency_limit": 2})
    (hourly,) = before["sdn-retrain"]["schedules"]
    other = {"schedule": {"cron": "30 */4 * * *", "timezone": "UTC"}}
    server.ask("PATCH", f"deployments/{retrain}/schedules/{hourly['id']}", other)
    server.ask("PATCH", f"deployments/{retrain}", {"paused": True})
    server.ask("PATCH", f"deployments/{rollback}", {"concurrency_limit": 3})
    (trigger,) = server.ask("GET", f"automations/related-to/prefect.deployment.{retrain}")
    server.ask("PATCH", f"automations/{trigger['id']}", {"enabled": False})
    changed = found(server)

    assert sorted(go(monkeypatch, "new")) == list(NAMES)
    after = found(server)
    for name in NAMES:
        assert after[name]["id"] == before[name]["id"]
        assert after[name]["version"] != before[name]["version"]
        mine, theirs = rhythm(after[name]), rhythm(changed[name])
        assert sorted(map(repr, mine[0])) == sorted(map(repr, theirs[0]))
        assert mine[1:] == theirs[1:]
        assert after[name]["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    (trigger,) = server.ask("GET", f"automations/related-to/prefect.deployment.{retrain}")
    assert trigger["enabled"] is False
    assert go(monkeypatch, "new") == []

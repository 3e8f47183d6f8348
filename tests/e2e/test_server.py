"""The flow on a Prefect server, started the way its UI does, done by a worker."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from registered_versions import NAME, aliases, registered

from pipelines.succession import Succession

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@pytest.mark.rest
def test_a_worker_runs_the_deployed_flow(chain, server):
    """`prefect deploy --all` on a server; a run created there is done by a worker, with Ray."""
    here, _ = chain
    schema = server.deployments["sdn-pipeline"]["parameter_openapi_schema"]["properties"]
    assert "tiny" in json.dumps(schema["recipe"])
    assert schema["changes"]["description"]
    run = server.start(here.store, ["search.trials=0", "stage_two.epochs=1"])
    state = server.wait_until(
        lambda: server.state(run) in FINAL and server.state(run), 240, "the end of the flow run"
    )
    assert state == "COMPLETED", server.log.read_text()[-4000:]
    artifacts = server.post("artifacts/filter", {})
    mine = {a["key"] for a in artifacts if a["flow_run_id"] == run}
    assert {"resolved-config", "progress-stage-two", "result"} <= mine


def test_a_worker_tunes_evaluates_and_promotes(chain, server):
    """Each shows its resolved config first, then what it found, without doing anything twice."""
    here, answer = chain
    name = answer["model"]["name"]
    asked = {
        "sdn-tune": {"recipe": "tiny", "search_trials": 2},
        "sdn-evaluate": {"model": f"models:/{name}/1"},
        "sdn-promote": {"model": name, "version": 1},
    }
    runs = {
        server.start_flow(flow, given | {"store": str(here.store)}): flow
        for flow, given in asked.items()
    }
    server.wait_until(
        lambda: all(server.state(run) in FINAL for run in runs), 240, "the end of the three runs"
    )
    shown = {flow: [] for flow in asked}
    for artifact in sorted(server.post("artifacts/filter", {}), key=lambda one: one["created"]):
        if artifact["flow_run_id"] in runs:
            shown[runs[artifact["flow_run_id"]]].append(artifact)
    for run, flow in runs.items():
        assert server.state(run) == "COMPLETED", server.log.read_text()[-4000:]
        assert shown[flow][0]["key"] == "resolved-config"
        assert '"name": "tiny"' in shown[flow][0]["data"]
    data = {flow: {one["key"]: one["data"] for one in found} for flow, found in shown.items()}
    assert "progress-search" not in data["sdn-tune"]
    assert "`weights_from`" in data["sdn-tune"]["weights"]
    assert "stage one" not in data["sdn-evaluate"]["result"]
    assert f"{name} version 1" in data["sdn-evaluate"]["result"]
    assert "report.html" in data["sdn-evaluate"]["report"]
    assert f"{name} version 1" in data["sdn-promote"]["decision"]


@pytest.mark.rest
def test_a_worker_rolls_back(server, tmp_path):
    """The deployed rollback makes the champion before the champion again, and shows it."""
    schema = server.deployments["sdn-rollback"]["parameter_openapi_schema"]["properties"]
    assert all(schema[name]["description"] for name in ("model", "store", "reason"))
    client = registered(tmp_path, versions=2)
    succession = Succession(client, NAME)
    for version in ("1", "2"):
        succession.succeed(version, lambda _: (True, "better"))
    parameters = {"model": "", "store": str(tmp_path), "reason": "drew nothing"}
    run = server.start_flow("sdn-rollback", parameters)
    state = server.wait_until(
        lambda: server.state(run) in FINAL and server.state(run), 120, "the end of the rollback"
    )
    assert state == "COMPLETED", server.log.read_text()[-4000:]
    assert aliases(client) == {"champion": "1", "previous": "2"}
    mine = [a for a in server.post("artifacts/filter", {}) if a["flow_run_id"] == run]
    config, shown = sorted(mine, key=lambda artifact: artifact["created"])
    assert (config["key"], shown["key"]) == ("resolved-config", "rollback")
    assert NAME in config["data"]
    assert "version 2 \u2192 version 1" in shown["data"]
    assert "drew nothing" in shown["data"]


@pytest.mark.rest
def test_a_scheduled_run_is_done_when_it_is_due(server):
    """The server's scheduler makes it, the worker does it, in the store beside the deployment."""
    client = registered(server.folder / "runs", versions=2)
    succession = Succession(client, NAME)
    for version in ("1", "2"):
        succession.succeed(version, lambda _: (True, "better"))
    deployment = server.deployments["sdn-rollback"]["id"]
    due = datetime.now(UTC) + timedelta(seconds=45)
    daily = {"interval": 24 * 3600, "anchor_date": due.isoformat()}
    made = server.post(f"deployments/{deployment}/schedules", [{"schedule": daily, "active": True}])
    # The scheduler looks once a minute, but after seconds at deployments that were just changed.
    httpx.patch(f"{server.api}/deployments/{deployment}", json={"paused": False}, timeout=30)

    def scheduled():
        asked = {"flow_runs": {"deployment_id": {"any_": [deployment]}}}
        found = [r for r in server.post("flow_runs/filter", asked) if r["auto_scheduled"]]
        return [run for run in found if run["state"]["type"] in FINAL]

    try:
        (run,) = server.wait_until(scheduled, 240, "the end of the scheduled run")
    finally:
        httpx.delete(f"{server.api}/deployments/{deployment}/schedules/{made[0]['id']}", timeout=30)
    assert run["state"]["type"] == "COMPLETED", server.log.read_text()[-4000:]
    assert datetime.fromisoformat(run["expected_start_time"]) == due
    # The server has it wait whole seconds, rounded.
    assert datetime.fromisoformat(run["start_time"]) >= due - timedelta(seconds=0.5)
    assert aliases(client) == {"champion": "1", "previous": "2"}

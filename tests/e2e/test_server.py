"""The flow on a Prefect server, started the way its UI does, done by a worker."""

from __future__ import annotations

import json

from registered_versions import NAME, aliases, registered

from pipelines.succession import Succession

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


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

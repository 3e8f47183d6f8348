"""The flow on a Prefect server, started the way its UI does, done by a worker."""

from __future__ import annotations

import json

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def test_a_worker_runs_the_deployed_flow(chain, server):
    """`prefect deploy --all` on a server; a run created there is done by a worker, with Ray."""
    here, _ = chain
    assert server.deployment["name"] == "sdn-pipeline"
    schema = server.deployment["parameter_openapi_schema"]["properties"]
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

"""What Prefect keeps of a flow that MLflow failed: no password in states, logs, artifacts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PASSWORD = "planted-pass-word"
FLOWS = """
import sys
from pipelines.flows.promote import promote
from pipelines.flows.rollback import rollback

for flow, asked in ((rollback, {}), (promote, {"version": 1})):
    try:
        flow(model="sdn-tiny", store=sys.argv[1], **asked)
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.rest
@pytest.mark.timeout(180)
def test_no_password_of_mlflow_comes_to_prefect(tmp_path):
    """MLflow's server is gone and its errors repeat its address: nothing that is kept or said has
    the password, in a form that was refused, a flow that failed, or a traceback.
    """
    home = tmp_path / "prefect"
    env = os.environ | {
        "PREFECT_HOME": str(home),
        "SDN_TRACKING_URI": f"http://somebody:{PASSWORD}@127.0.0.1:9",
        "SDN_CACHE": str(tmp_path / "cache"),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    }
    for name in ("PREFECT_API_URL", "PREFECT_LOGGING_LEVEL"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", FLOWS, str(tmp_path / "store")],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=170,
    )
    assert done.stdout.count("RegistryError") == 2, done.stderr
    kept = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
    for told in ("failed in the rollback", "This cannot be run", "Traceback", "somebody:***@"):
        assert told.encode() in kept, f"Prefect keeps {told!r}"
    assert PASSWORD.encode() not in kept
    assert PASSWORD not in done.stdout + done.stderr

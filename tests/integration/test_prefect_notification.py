"""Prefect's own notification: what infra/prefect-notification.yaml makes, on a real server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import uuid4

import httpx
import pytest
from places import PREFECT, ROOT, free_port, place, prefect_server

pytestmark = pytest.mark.timeout(300)
FILE = ROOT / "infra" / "prefect-notification.yaml"
BLOCK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock as Webhook
text = {"text": "{{subject}} | {{body}}"}
block = Webhook(name="sdn", url=sys.argv[1], method="POST", json_data=text)
print(block.save("sdn", overwrite=True))
"""


@pytest.fixture
def hook():
    """An address, and what was sent to it."""
    texts = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            texts.append(json.loads(content)["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", texts
    server.shutdown()
    server.server_close()


def failed_run(api, tags):
    """A run with these tags that has failed."""
    flow = httpx.post(f"{api}/flows/", json={"name": "sdn-pipeline"}).json()["id"]
    content = {"flow_id": flow, "name": f"run-of-{tags[0]}", "tags": tags}
    run = httpx.post(f"{api}/flow_runs/", json=content).json()["id"]
    state = {"type": "FAILED", "name": "Failed", "message": "no space left"}
    httpx.post(f"{api}/flow_runs/{run}/set_state", json={"state": state}).raise_for_status()


def test_a_run_that_failed_is_told_of(tmp_path, hook):
    """The automation of the file is made, and tells of a failed run of ours, and of no other."""
    url, texts = hook
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    env = place(tmp_path).env | {"PREFECT_API_URL": api}
    with prefect_server(tmp_path, port, env):
        made = subprocess.run(
            (sys.executable, "-c", BLOCK, url), env=env, capture_output=True, text=True, check=True
        )
        automation = tmp_path / "notification.yaml"
        automation.write_text(FILE.read_text().replace("BLOCK_ID", made.stdout.split()[-1]))
        subprocess.run(
            (PREFECT, "automation", "create", "--from-file", str(automation)), env=env, check=True
        )
        failed_run(api, [f"other-{uuid4().hex}"])
        failed_run(api, ["sdn", "training"])
        for _ in range(600):
            if texts:
                break
            time.sleep(0.1)
    assert len(texts) == 1
    assert texts[0].startswith("sdn-pipeline: Failed | Run run-of-sdn: no space left http")

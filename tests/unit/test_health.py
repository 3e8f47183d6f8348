import base64
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest

from pipelines.health import main

LOGIN = "someone:a-long-password"


class Answering(BaseHTTPRequestHandler):
    """/health is well, /ill is not; the workers of a pool are told to who logs in."""

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def do_POST(self):
        shown = f"Basic {base64.b64encode(LOGIN.encode()).decode()}"
        if self.headers.get("Authorization") != shown:
            self.send_response(401)
            self.end_headers()
            return
        pool = self.path.split("/")[3]
        workers = {"busy": [{"status": "OFFLINE"}, {"status": "ONLINE"}], "left": []}[pool]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(workers).encode())

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = HTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def server_known(monkeypatch, address):
    monkeypatch.setenv("PREFECT_API_URL", f"http://{address}/api")
    monkeypatch.setenv("SDN_AUTH", LOGIN)
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)


def test_what_answers_is_healthy(address):
    """A page that answers, a port that listens, a worker that is online, a process are health."""
    me = psutil.Process().name()
    asked = [f"http://{address}/health", f"tcp://{address}", "worker://busy", f"process://{me}"]
    assert main(asked) == 0


@pytest.mark.parametrize("kind", ["page", "worker", "port", "process", "address"])
def test_what_does_not_answer_is_named(kind, address, capsys):
    """What does not answer or is not there gives status 1, and its name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
        asked = {
            "page": f"http://{address}/ill",
            "worker": "worker://left",
            "port": f"tcp://127.0.0.1:{closed}",
            "process": "process://no-such-process",
            "address": "ftp://127.0.0.1",
        }[kind]
        assert main([f"tcp://{address}", asked]) == 1
    assert capsys.readouterr().err.startswith(f"{asked}: ")


def test_a_worker_needs_the_login(monkeypatch, capsys):
    """Where the server asks who one is, a wrong login is a failure that does not repeat it."""
    monkeypatch.setenv("SDN_AUTH", "someone:wrong-password")
    assert main(["worker://busy"]) == 1
    said = capsys.readouterr().err
    assert "401" in said
    assert "wrong-password" not in said

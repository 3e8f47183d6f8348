"""Notices, to a real HTTP server and a real command."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pipelines import notifying
from pipelines.notifying import forget, notify
from pipelines.settings import Settings

SECRET_PATH = "/services/T0/B0/hidden-in-the-address"


@contextmanager
def hook(*statuses):
    """A server that answers with these statuses, the last one again and again; what it got."""
    got, left = [], list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, json.loads(content)))
            self.send_response(left.pop(0) if len(left) > 1 else left[0])
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{SECRET_PATH}", got
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def told(tmp_path):
    """A command that writes down what it is told; what it was told so far."""
    script = tmp_path / "my command.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "said = {'stdin': json.load(sys.stdin), 'argument': sys.argv[2],\n"
        "        'link': os.environ['SDN_NOTICE_LINK'], 'kind': os.environ['SDN_NOTICE_KIND']}\n"
        "with pathlib.Path(sys.argv[1]).open('a') as file: print(json.dumps(said), file=file)\n"
    )
    out = tmp_path / "told"
    command = f"{sys.executable} '{script}' {out} '$(no shell); *'"

    def read():
        return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    return command, read


def settings(folder, **changes):
    """Settings with a store below the folder."""
    return Settings(store=str(folder / "store"), **changes)


def test_a_command_is_told_without_a_shell(told, tmp_path):
    """JSON on its standard input, the fields as variables; no shell reads its arguments."""
    command, read = told
    here = settings(tmp_path, notify_command=command)
    assert notify(here, "failure", "it failed", "because", "http://page", key="k")
    (said,) = read()
    assert said["argument"] == "$(no shell); *"
    assert (said["kind"], said["link"]) == ("failure", "http://page")
    assert said["stdin"] == {
        "kind": "failure", "title": "it failed", "text": "because", "link": "http://page",
        "key": "k",
    }  # fmt: skip


def test_a_server_gets_json_with_a_text(tmp_path):
    """A field `text` holds title, text and link, as Slack and its likes show it."""
    with hook(200) as (url, got):
        assert notify(
            settings(tmp_path, notify_url=url), "promotion", "v2", "is better", "http://p"
        )
    ((path, content),) = got
    assert path == SECRET_PATH
    assert content["text"] == "v2\nis better\nhttp://p"
    assert content["kind"] == "promotion"


def test_the_same_event_is_told_of_once(told, tmp_path):
    """By its key, whoever tells of it; a run that is tried again may be told of again."""
    command, read = told
    here = settings(tmp_path, notify_command=command)
    for title in ("first", "second"):
        notify(here, "failure", title, "", key="run-1")
    notify(here, "failure", "another", "", key="run-2")
    forget(here, "run-1")
    notify(here, "failure", "third", "", key="run-1")
    assert [said["stdin"]["title"] for said in read()] == ["first", "another", "third"]


def test_a_busy_server_is_asked_again(tmp_path, monkeypatch):
    """503 twice, then taken: delivered, once."""
    monkeypatch.setattr(notifying._post.retry, "sleep", lambda seconds: None)
    with hook(503, 429, 200) as (url, got):
        assert notify(settings(tmp_path, notify_url=url), "data", "t", "x")
    assert len(got) == 3


def test_a_refusal_is_no_error_says_no_address_and_may_be_told_later(tmp_path, caplog):
    """404 is not tried again; the log names the host alone, at every level; later it may go."""
    caplog.set_level(logging.DEBUG)
    with hook(404, 200) as (url, got):
        here = settings(tmp_path, notify_url=url)
        assert not notify(here, "failure", "t", "x", key="k")
        assert len(got) == 1
        assert "127.0.0.1 answered 404" in caplog.text
        assert notify(here, "failure", "t", "x", key="k")
    assert "hidden-in-the-address" not in caplog.text
    assert "hidden-in-the-address" not in repr(here)


@pytest.mark.parametrize(
    "command",
    ["no-such-command-anywhere", "false", "'unclosed", ""],
    ids=["missing", "fails", "no command line", "empty"],
)
def test_a_command_that_cannot_be_run_is_no_error(command, tmp_path):
    """Nothing is raised, whatever the user has configured."""
    assert not notify(settings(tmp_path, notify_command=command), "failure", "t", "x")


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch, caplog):
    """After its time it is killed, and what it has started with it."""
    monkeypatch.setattr(notifying, "COMMAND_S", 0.5)
    mark = tmp_path / "alive"
    command = f"sh -c '(sleep 2; touch {mark}) & sleep 60'"
    assert not notify(settings(tmp_path, notify_command=command), "failure", "t", "x")
    assert "no end within" in caplog.text
    time.sleep(2.5)
    assert not mark.exists()


def test_a_full_disk_keeps_nobody_from_being_told(told, tmp_path):
    """Where no mark can be kept, the notice goes out all the same."""
    command, read = told
    (tmp_path / "file").write_text("")
    here = Settings(store=str(tmp_path / "file" / "store"), notify_command=command)
    assert notify(here, "failure", "disk full", "x")
    assert len(read()) == 1


def test_credentials_are_not_said(told, tmp_path, monkeypatch):
    """Neither what variables hold in secret, nor users in addresses, nor the hook's own address."""
    command, read = told
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-1")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-secret-2")
    here = settings(tmp_path, notify_command=command)
    user = "somebody:some-word"
    text = f"s3 refused planted-secret-1 at postgresql://{user}@host/db"
    notify(here, "failure", "planted-secret-2", text, f"http://{user}@host/page")
    said = json.dumps(read())
    assert "planted-secret" not in said
    assert "some" not in said
    assert "host/db" in said
    url = "http://127.0.0.1:1/hidden"
    here = settings(tmp_path, notify_command=command, notify_url=url)
    notify(here, "failure", "t", f"to {url}")
    assert "hidden" not in json.dumps(read())


def test_nothing_is_configured(tmp_path):
    """Nobody is told, and no mark is left that would keep a later notice back."""
    assert not notify(settings(tmp_path), "failure", "t", "x")
    assert not (tmp_path / "store" / notifying.MARKS).exists()

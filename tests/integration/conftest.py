"""What the integration tests share: an S3 server, and files on it."""

from __future__ import annotations

import pytest
import s3_server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running S3 server with the bucket `data`."""
    with s3_server.running(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture
def user(server, monkeypatch):
    """The server, with the credentials of somebody who may use its bucket in the environment."""
    for name, value in server.keys().items():
        monkeypatch.setenv(name, value)
    return server

"""Ports: taken or free, and who has them."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from pipelines.ports import PortError, check_port, free_ports, listener, listens


@pytest.fixture
def taken():
    """A port on which this process listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen()
        yield found.getsockname()[1]


def test_a_port_in_use_is_refused_with_who_has_it(taken):
    """The text has the port, the process and a remedy."""
    with pytest.raises(PortError) as refused:
        check_port(taken, what="MLflow", option="--mlflow-port")
    name = psutil.Process().name()
    expected = f"port {taken} for MLflow is in use by {name} (pid {os.getpid()})"
    assert str(refused.value).startswith(expected)
    assert f"--mlflow-port {taken + 1}" in str(refused.value)


def test_a_port_in_use_by_who_cannot_be_seen_is_refused(taken, monkeypatch):
    """Where another user has it, that is not said and the rest is."""

    def denied(kind):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", denied)
    with pytest.raises(PortError, match=f"port {taken} for S3 is in use: end"):
        check_port(taken, what="S3", option="--s3-port")


def test_a_free_port_is_taken_by_nobody():
    """Nothing is refused, nobody listens, and free ports differ."""
    found = free_ports(8)
    assert len(set(found)) == 8
    check_port(found[0], what="S3", option="--s3-port")
    assert listener(found[0]) is None
    assert not listens(found[0])


def test_who_listens_is_seen(taken):
    """A listening port is seen as such, with its process."""
    assert listens(taken)
    assert listener(taken).pid == os.getpid()

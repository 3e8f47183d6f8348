"""Ports of this machine: whether one can be had, and who has it if not."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from dataclasses import dataclass

import psutil

HOST = "127.0.0.1"
"""Where everything listens unless told otherwise."""


class PortError(RuntimeError):
    """A port cannot be had; the text says which, who has it and what to do."""


@dataclass(frozen=True, kw_only=True)
class Listener:
    """A process that listens on a port."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


def check_port(port: int, *, what: str, option: str, host: str = HOST) -> None:
    """Refuse a port that cannot be listened on, before anything is started.

    Args:
        port: on this machine.
        what: who wants it.
        option: names another one.
        host: the address on which it is wanted.

    Raises:
        PortError: it is in use, or not ours to take.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = error.strerror
            if error.errno == errno.EADDRINUSE:
                found = listener(port)
                why = "in use" if found is None else f"in use by {found}"
            other = f"{option} {port + 1}" if port < 65535 else option
            raise PortError(
                f"port {port} for {what} is {why}: end what listens there, or name another with "
                f"{other}"
            ) from error


def listener(port: int) -> Listener | None:
    """Who listens on a port; None where nobody does, or where it is not ours to see."""
    with suppress(psutil.Error, OSError):  # macOS shows this to root alone
        for one in psutil.net_connections(kind="tcp"):
            listens = one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port
            if listens and one.pid is not None:
                return Listener(pid=one.pid, name=psutil.Process(one.pid).name())
    return None


def listens(port: int) -> bool:
    """Whether anything on this machine takes connections at a port."""
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """So many ports that nothing listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()

"""Whether parts answer, for containers' health checks: `python -m pipelines.health ADDRESS..`.

An address is `http://host:port/path`, which must answer 2xx, `tcp://host:port`, which must take a
connection, `worker://POOL`: the Prefect server knows a worker of this work pool that is online, or
`process://NAME`: a process of this name runs in this container.
Asked every few seconds beside what it asks about, so little is imported.
"""

from __future__ import annotations

import base64
import json
import socket
import sys
import urllib.request
from urllib.error import URLError
from urllib.parse import urlsplit

import psutil

from pipelines.settings import Settings

_PATIENCE_S = 8


def main(addresses: list[str]) -> int:
    """Ask each address; say what does not answer.

    Returns:
        The exit status: 0 where all answer.
    """
    failed = 0
    for address in addresses:
        try:
            ask(address)
        except (OSError, URLError, ValueError, psutil.Error) as error:
            print(f"{address}: {error}", file=sys.stderr)
            failed = 1
    return failed


def ask(address: str) -> None:
    """Return if what is at the address answers as it should.

    Raises:
        OSError: it does not; HTTP errors are of this kind, too.
        ValueError: no such address, or an answer that is none.
    """
    parts = urlsplit(address)
    if parts.scheme in {"http", "https"}:
        _open(urllib.request.Request(address))  # noqa: S310 (the scheme has just been looked at)
    elif parts.scheme == "tcp" and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=_PATIENCE_S).close()
    elif parts.scheme == "worker" and parts.netloc:
        _worker(parts.netloc)
    elif parts.scheme == "process" and parts.netloc:
        _process(parts.netloc)
    else:
        raise ValueError("expected http://.., tcp://host:port, worker://POOL or process://NAME")


def _process(name: str) -> None:
    # A dead one that nobody has collected yet is none.
    found = [one.status() for one in psutil.process_iter() if one.name() == name]
    if all(status == psutil.STATUS_ZOMBIE for status in found):
        raise OSError(f"no process {name} runs")


def _worker(pool: str) -> None:
    settings = Settings()
    api = settings.prefect_api_url
    if api is None:
        raise ValueError("PREFECT_API_URL is not set: no server knows of workers")
    headers = {"Content-Type": "application/json"}
    login = settings.credentials
    if login is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(':'.join(login).encode()).decode()}"
    url = f"{api.rstrip('/')}/work_pools/{pool}/workers/filter"
    found = json.loads(_open(urllib.request.Request(url, b"{}", headers)))  # noqa: S310 (configured)
    if not any(worker.get("status") == "ONLINE" for worker in found):
        raise OSError(f"none of {len(found)} workers of pool {pool} is online")


def _open(request: urllib.request.Request) -> bytes:
    # Without proxies: what is asked is a neighbour.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_PATIENCE_S) as answer:
        content: bytes = answer.read()
    return content


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

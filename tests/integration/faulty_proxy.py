"""A proxy between a client and an S3 server that fails on purpose: 503, resets, cut or changed
bodies.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

_HOP = {"connection", "keep-alive", "transfer-encoding"}


class FaultyProxy:
    """Listens on 127.0.0.1; `shares` gives each fault its share of the requests by `method`.

    Faults: `503`, `reset` and `cut` in the middle of a body, `flip` changes a byte of it.
    """

    def __init__(
        self, host: str, port: int, shares: dict[str, float], seed: int = 0, method: str = "GET"
    ) -> None:
        self.shares, self.method = shares, method
        self.counts: Counter[str] = Counter()
        self._draw = random.Random(seed)
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def _any(self) -> None:
                proxy._answer(self, host, port)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _any  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _fault(self, method: str) -> str:
        if method != self.method:
            return "none"
        with self._lock:
            draw = self._draw.random()
            for fault, share in self.shares.items():
                if draw < share:
                    self.counts[fault] += 1
                    return fault
                draw -= share
            self.counts["none"] += 1
            return "none"

    def _answer(self, handler: BaseHTTPRequestHandler, host: str, port: int) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        fault = self._fault(handler.command)
        if fault == "503":
            page = b"<?xml version='1.0'?><Error><Code>SlowDown</Code></Error>"
            handler.send_response(503)
            handler.send_header("Content-Length", str(len(page)))
            handler.end_headers()
            handler.wfile.write(page)
            return
        connection = _connection(host, port)
        # The signature covers the Host header, which names this proxy: it goes on as it came.
        connection.putrequest(
            handler.command, handler.path, skip_host=True, skip_accept_encoding=True
        )
        for name, value in handler.headers.items():
            if name.lower() not in _HOP:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                handler.send_header(name, value)
        handler.end_headers()
        if fault in ("reset", "cut"):
            handler.wfile.write(data[: len(data) // 2])
            handler.wfile.flush()
            handler.close_connection = True
            if fault == "reset":  # RST instead of FIN
                linger = struct.pack("ii", 1, 0)
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
            return
        if fault == "flip" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        handler.wfile.write(data)


_local = threading.local()


def _connection(host: str, port: int) -> http.client.HTTPConnection:
    """One connection to the server for each thread of the proxy."""
    if not hasattr(_local, "connection"):
        _local.connection = http.client.HTTPConnection(host, port, timeout=30)
        _local.connection.connect()
        _local.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    found: http.client.HTTPConnection = _local.connection
    return found

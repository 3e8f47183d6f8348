"""A door before a server that can be shut: whoever asks then is refused, and open talks are cut."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self


class Gate:
    """Forwards connections on a port of 127.0.0.1 to another one while it is open."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._talks: list[socket.socket] = []
        self._lock = threading.Lock()
        self._door = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._door.getsockname()[1]

    def __enter__(self) -> Self:
        self._serve()
        return self

    def __exit__(self, *_: object) -> None:
        self.shut()

    def shut(self) -> None:
        """Refuse everybody, and cut what is being said."""
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        with self._lock:
            for talk in self._talks:
                with suppress(OSError):
                    talk.shutdown(socket.SHUT_RDWR)
                talk.close()
            self._talks.clear()

    def open(self) -> None:
        """Let everybody in again, on the same port."""
        self._door = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self._serve()

    def _serve(self) -> None:
        threading.Thread(target=self._let_in, args=(self._door,), daemon=True).start()

    def _let_in(self, door: socket.socket) -> None:
        while True:
            try:
                near, _ = door.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                return
            with self._lock:
                self._talks += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    @staticmethod
    def _carry(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        with suppress(OSError):
            other.shutdown(socket.SHUT_WR)

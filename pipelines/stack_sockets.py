"""Sockets that SeaweedFS puts into /tmp whatever it is told, and leaves there when it is killed."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_NOTE = "sockets"
_PATH = "/tmp/seaweedfs-{}-grpc-{}.sock"  # noqa: S108 (its own choice)


def note_of_sockets(folder: Path, grpc: Mapping[str, int]) -> dict[Path, str]:
    """A file, with its text, that names the sockets of a SeaweedFS.

    Args:
        folder: of its data.
        grpc: service -> its port of gRPC.
    """
    lines = [_PATH.format(service, port) for service, port in grpc.items()]
    return {folder / _NOTE: "\n".join([*lines, ""])}


def clear_sockets(folder: Path) -> None:
    """Remove those that an ended SeaweedFS has left, but none at which somebody listens."""
    note = folder / _NOTE
    with suppress(OSError):
        for path in map(Path, note.read_text().split()):
            if path.is_socket() and not _listens(path):
                path.unlink()
    note.unlink(missing_ok=True)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.connect(str(path))
        return True
    return False

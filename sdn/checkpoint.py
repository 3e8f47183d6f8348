"""Checkpoints of a training: all of its state, written atomically, refused when damaged."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
"""Version of the layout below."""
STATE, MARK = "state.pt", "checkpoint.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint that is incomplete or whose bytes are not those that were written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Everything that a training needs to go on as if it had not stopped."""

    step: int
    """Global step from which to go on: the data position."""
    images_seen: int
    student: dict[str, Any]
    average: dict[str, Any] | None
    """Moving average of the student's weights; None where none is kept."""
    optimizer: dict[str, Any]
    config: dict[str, Any]
    """Resolved config of the stage."""
    precision: str
    """What the stage computes in; a resumed stage keeps to it."""


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write into `folder`: the state under a temporary name, then the mark that completes it.

    Raises:
        OSError: the folder cannot be written, or the disk is full; nothing that reads as a
            checkpoint is left then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = {name: getattr(checkpoint, name) for name in Checkpoint.__slots__}
    buffer = io.BytesIO()
    torch.save(fields, buffer)
    data = buffer.getvalue()
    _write(folder / STATE, data)
    mark = {
        "format": FORMAT,
        "step": checkpoint.step,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "torch": torch.__version__,
    }
    _write(folder / MARK, json.dumps(mark).encode())


def load(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, verified.

    Raises:
        DamagedCheckpointError: it is incomplete, or its bytes differ from what was written.
    """
    try:
        mark = json.loads((folder / MARK).read_bytes())
        data = (folder / STATE).read_bytes()
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{folder} holds no complete checkpoint: {error}") from error
    if not isinstance(mark, dict) or not {"format", "bytes", "sha256"} <= mark.keys():
        raise DamagedCheckpointError(f"{folder} holds no complete checkpoint: {MARK} is no mark")
    if mark["format"] != FORMAT:
        raise DamagedCheckpointError(
            f"{folder} has checkpoint format {mark['format']}, this version reads {FORMAT}"
        )
    if len(data) != mark["bytes"] or hashlib.sha256(data).hexdigest() != mark["sha256"]:
        raise DamagedCheckpointError(
            f"{folder / STATE} is damaged: {len(data)} bytes that do not match the digest of the "
            f"{mark['bytes']} written"
        )
    return Checkpoint(**torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def newest(parent: Path) -> Path | None:
    """The complete checkpoint of the highest step among the folders in `parent`, or None."""
    found = []
    for folder in parent.glob("step-*") if parent.is_dir() else ():
        try:
            found.append((load(folder).step, folder))
        except DamagedCheckpointError:
            continue  # a write that was cut off; the one before it still counts
    return max(found)[1] if found else None


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

"""Checkpoints of a training: all of its state, written atomically, refused when damaged."""

from __future__ import annotations

import hashlib
import io
import json
import platform
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch

from sdn import METHOD_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdn.data.files import Files

FORMAT = 2
"""Version of the layout below."""
FOLDER = "checkpoints"
STATE, MARK = "state.pt", "checkpoint.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint that is incomplete or whose bytes are not those that were written."""


def _versions() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "method": str(METHOD_VERSION),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Everything that a training needs to go on as if it had not stopped."""

    step: int
    """Global step from which to go on: the data position."""
    steps: int
    """Global steps of the whole training."""
    images_seen: int
    model: dict[str, Any]
    """Weights and buffers of what is trained."""
    average: dict[str, Any] | None
    """Moving average of the weights; None where none is kept."""
    optimizer: dict[str, Any]
    schedule: dict[str, Any] | None = None
    """Of the learning rate; None where it is a function of the step alone."""
    scaler: dict[str, Any] | None = None
    """Of the losses in fp16; None elsewhere."""
    generator: torch.Tensor | None = None
    """State of the random generator, the same on every rank; None where nothing is drawn."""
    critics: dict[str, Any] | None = None
    """Weights and optimizer of stage three's critics; None in all other stages."""
    config: dict[str, Any]
    """Resolved config of the stage."""
    precision: str
    """What the stage computes in; a resumed stage keeps to it."""
    versions: dict[str, str] = field(default_factory=_versions)
    """Of what computed it."""

    def weights(self) -> dict[str, Any]:
        """The weights to go on with: the moving average where one is kept."""
        return self.model if self.average is None else self.average


class Checkpoints:
    """The checkpoints of one training: a folder each below `checkpoints/` of its place.

    The state is written first and the mark, which has its digest, last. Only what has a mark and
    matches it is ever loaded.
    """

    def __init__(
        self, files: Files, keep: int = 2, *, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Args:
        files: the place of the training.
        keep: newest ones kept, beside the one of the lowest loss.
        say: told of a damaged checkpoint that is passed over.
        """
        self._files, self.keep, self._say = files, keep, say

    def save(self, checkpoint: Checkpoint, loss: float | None = None) -> None:
        """Write a checkpoint, then remove those that are not to be kept.

        Args:
            checkpoint: all state.
            loss: mean loss since the checkpoint before; decides which one is the best.

        Raises:
            OSError: the place cannot be written, or is full; the checkpoints before are all there.
        """
        folder = _folder(checkpoint.step)
        # What has this name is damaged, else the training would have gone on from it.
        self._files.remove(f"{folder}/{MARK}")
        with self._files.writing(f"{folder}/{STATE}") as file:
            hashed = _Hashing(file)
            state = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
            try:
                torch.save(state, cast("BinaryIO", hashed))
            except RuntimeError as error:
                # torch closes its archive over a write that failed, and complains of that instead.
                raise hashed.failed or error from None
        mark = {
            "format": FORMAT,
            "step": checkpoint.step,
            "loss": loss,
            "bytes": hashed.count,
            "sha256": hashed.digest.hexdigest(),
            "versions": checkpoint.versions,
        }
        self._files.write(f"{folder}/{MARK}", json.dumps(mark).encode())
        self._prune()

    def newest(self) -> Checkpoint | None:
        """The newest one that verifies; damaged ones are passed over, and said."""
        for step in sorted(self._steps(), reverse=True):
            try:
                return self.load(step)
            except DamagedCheckpointError as error:
                self._say(f"{error}; an older one is taken")
        return None

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step, verified.

        Raises:
            DamagedCheckpointError: it is incomplete, or its bytes differ from what was written.
        """
        folder = _folder(step)
        where = f"{self._files.uri}/{folder}"
        mark = self._mark(folder)
        try:
            data = self._files.read(f"{folder}/{STATE}")
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{where} holds no complete checkpoint: {error}") from None
        if len(data) != mark["bytes"] or hashlib.sha256(data).hexdigest() != mark["sha256"]:
            raise DamagedCheckpointError(
                f"{where}/{STATE} is damaged: {len(data)} bytes that do not match the digest of "
                f"the {mark['bytes']} written"
            )
        return Checkpoint(**torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))

    def _mark(self, folder: str) -> dict[str, Any]:
        where = f"{self._files.uri}/{folder}"
        try:
            mark = json.loads(self._files.read(f"{folder}/{MARK}"))
        except (FileNotFoundError, ValueError) as error:
            raise DamagedCheckpointError(f"{where} holds no complete checkpoint: {error}") from None
        if not isinstance(mark, dict) or not {"format", "bytes", "sha256"} <= mark.keys():
            raise DamagedCheckpointError(f"{where} holds no complete checkpoint: {MARK} is no mark")
        if mark["format"] != FORMAT:
            raise DamagedCheckpointError(
                f"{where} has checkpoint format {mark['format']}, this version reads {FORMAT}"
            )
        return mark

    def _steps(self) -> Iterator[int]:
        for info in self._files.walk(FOLDER):
            name, _, file = info.name.removeprefix(f"{FOLDER}/").partition("/")
            if file == MARK and name.startswith("step-") and name[5:].isdigit():
                yield int(name[5:])

    def _prune(self) -> None:
        """Remove all but the newest and the best; the mark first, so that none is left half."""
        losses = {}
        for step in self._steps():
            try:
                losses[step] = self._mark(_folder(step)).get("loss")
            except DamagedCheckpointError:
                losses[step] = None
        known = [(loss, step) for step, loss in losses.items() if loss is not None]
        kept = {*sorted(losses)[-self.keep :], *(step for _, step in sorted(known)[:1])}
        for step in losses.keys() - kept:
            for name in (MARK, STATE):
                self._files.remove(f"{_folder(step)}/{name}")


def _folder(step: int) -> str:
    return f"{FOLDER}/step-{step:09d}"


class _Hashing:
    """A file that is written, with the digest of what went through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest, self.count = hashlib.sha256(), 0
        self.failed: BaseException | None = None

    def write(self, data: bytes) -> int:
        """Pass on and count."""
        self.digest.update(data)
        self.count += len(data)
        try:
            return self._file.write(data)
        except BaseException as error:
            self.failed = error
            raise

    def flush(self) -> None:
        """Pass on."""
        self._file.flush()

"""What a training leaves in its place so that nothing of it is lost: checkpoints, ledger, points.

The place is a folder of a disk or of S3, shared by all ranks and all attempts:

    attempts/    a file for each start of the training: where it went on, with how many ranks
    checkpoints/ see `sdn.checkpoint`
    ledger/      keys of the samples that each step consumed, by attempt and rank
    points/      losses, rates and the like, by attempt
    sheets/      pictures of fixed captions at checkpoints
    failed.json  why the training cannot go on, where it cannot
"""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import torch

from sdn.checkpoint import Checkpoint, Checkpoints
from sdn.journal import Journal
from sdn.ledger import ledger_prefix, note_attempt

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdn.data.files import Files
    from sdn.ranks import Rank
    from sdn.training import StepReport, Trainee

POINTS, SHEETS, FAILED = "points", "sheets", "failed.json"


class Recorder:
    """Writes down one attempt of a training, on one rank. Used as a context."""

    def __init__(
        self,
        files: Files,
        rank: Rank,
        *,
        say: Callable[[str], None] = lambda text: None,
        sheet: Callable[[Checkpoint], bytes] | None = None,
        every_s: float = 2.0,
    ) -> None:
        """Args:
        files: the place of the training.
        rank: this one.
        say: told what a person should know.
        sheet: a checkpoint -> PNG of what it draws.
        every_s: seconds between two writes of ledger and points in the background.
        """
        self._files, self._rank, self._sheet = files, rank, sheet
        self._checkpoints = Checkpoints(files, say=say)
        self._every_s = every_s
        self._ledger: Journal | None = None
        self._points: Journal | None = None
        # One thread for what a sheet computes: with a second pool OpenMP counts more threads than
        # cores, lets none of them spin while it waits, and training loses a quarter.
        self._writer = ThreadPoolExecutor(
            1, "checkpoints", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._written: Future[None] | None = None

    def resume(self) -> Checkpoint | None:
        """The newest whole checkpoint, the same one on every rank; None where there is none."""
        found = self._checkpoints.newest() if self._rank.rank == 0 else None
        step = self._rank.agree(None if found is None else found.step)
        if found is None and step is not None:
            found = self._checkpoints.load(step)
        return found

    def keep(self, count: int) -> None:
        """Keep this many newest checkpoints beside the best."""
        self._checkpoints.keep = count

    def begin(self, trainee: Trainee) -> None:
        """Open ledger and points of a new attempt, which goes on where `trainee` stands."""
        number = -1
        if self._rank.rank == 0:
            about = {"precision": trainee.precision, "steps": trainee.steps}
            number = note_attempt(
                self._files, start=trainee.step, world=self._rank.world, about=about
            )
        number = self._rank.agree(number)
        prefix = ledger_prefix(number, self._rank.rank)
        self._ledger = Journal(self._files, prefix, every_s=self._every_s)
        if self._rank.rank == 0:
            prefix = f"{POINTS}/{number:04d}"
            self._points = Journal(self._files, prefix, every_s=self._every_s)

    def consumed(self, step: int, epoch: int, keys: tuple[str, ...]) -> None:
        """Note the samples of a step that has been done."""
        assert self._ledger is not None
        self._ledger.add(step, {"epoch": epoch, "keys": keys})

    def report(self, report: StepReport, time_ms: int) -> None:
        """Note a point; of rank 0 alone."""
        if self._points is not None:
            values = dataclasses.asdict(report)
            self._points.add(values.pop("step"), {"time_ms": time_ms, **values})

    def save(self, trainee: Trainee) -> None:
        """Keep all state, in the background; the ledger up to here first, on every rank.

        Raises:
            OSError: this write of the ledger or the checkpoint before failed.
        """
        self.wait()
        for journal in (self._ledger, self._points):
            if journal is not None:
                journal.flush()
        self._rank.any(False)  # the ledgers of all ranks are there
        if self._rank.rank == 0:
            taken = trainee.checkpoint()
            self._written = self._writer.submit(self._write, taken, trainee.recent_loss)

    def _write(self, taken: Checkpoint, loss: float | None) -> None:
        self._checkpoints.save(taken, loss)
        if self._sheet is not None:
            self._files.write(f"{SHEETS}/step-{taken.step:09d}.png", self._sheet(taken))

    def wait(self) -> None:
        """Return when the checkpoint under way is whole.

        Raises:
            OSError: it could not be written; those before are all there.
        """
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Finish what is under way; an error on its way already is not hidden by another."""
        try:
            self.wait()
            for journal in (self._ledger, self._points):
                if journal is not None:
                    journal.close()
        except OSError:
            if error is None:
                raise
        finally:
            self._writer.shutdown()


def note_failure(files: Files, error: BaseException, **about: Any) -> None:
    """Note that the same command would fail again in the same way, and why."""
    entry = {"error": type(error).__name__, "text": str(error), **about}
    files.write(FAILED, json.dumps(entry).encode())


def known_failure(files: Files) -> str | None:
    """Why this training cannot go on; None where nothing is known against it."""
    if not files.exists(FAILED):
        return None
    text: str = json.loads(files.read(FAILED))["text"]
    return text

"""A training that cannot be lost: opened, gone on with, written down, ended or stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from sdn.diverging import Divergence
from sdn.ranks import ALONE, Rank
from sdn.recording import Recorder, known_failure, note_failure
from sdn.training import LossNotFiniteError, Taken, Trainee, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from sdn.checkpoint import Checkpoint
    from sdn.data.files import Files
    from sdn.training import StepReport

B = TypeVar("B", bound=Taken)


@dataclass(frozen=True, kw_only=True)
class Work(Generic[B]):
    """A training that stands somewhere, and all it needs to go on."""

    trainee: Trainee
    batches: Iterable[B]
    """From the trainee's step on."""
    advance: Callable[[B], tuple[dict[str, Tensor], Tensor]]
    save_every: int
    """Steps between two checkpoints."""
    keep: int = 2
    """Newest checkpoints kept."""


class Opener(Protocol):
    """Opens a training at its start or, given a checkpoint, where that was taken."""

    def __call__(self, resume: Checkpoint | None, rank: Rank, /) -> Work[Any]:
        """The training on this rank."""


class KnownFailureError(ValueError):
    """The same training has failed before, and would again."""


def refuse_known_failure(files: Files) -> None:
    """Before work starts: refuse a training of which it is known that it cannot go on.

    Raises:
        KnownFailureError: says why, what to change, and what to delete to try it again as it is.
    """
    text = known_failure(files)
    if text is not None:
        raise KnownFailureError(
            f"{text} (this was found by an earlier run; to try the same again, delete "
            f"{files.uri}/failed.json)"
        )


def run_recorded(
    opener: Opener,
    files: Files,
    *,
    rank: Rank = ALONE,
    report: Callable[[StepReport], None] = lambda step: None,
    alive: Callable[[int], None] = lambda step: None,
    stopping: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
    sheet: Callable[[Checkpoint], bytes] | None = None,
) -> tuple[Trainee, bool]:
    """Train from the newest whole checkpoint of a place to the end.

    Args:
        opener: what is trained.
        files: the place of the training, the same for every rank and every attempt.
        rank: this one.
        report: receives the progress of rank 0.
        alive: called after each step of this rank with the steps done.
        stopping: whether this rank has been asked to stop.
        say: told what a person should know.
        sheet: see `Recorder`.

    Returns:
        The trainee, and whether it is at its end: False where a rank was asked to stop.

    Raises:
        LossNotFiniteError, KnownFailureError: it cannot go on as it is.
        OSError: a checkpoint could not be written; those before are all there.
    """
    refuse_known_failure(files)
    with Recorder(files, rank, say=say, sheet=sheet if rank.rank == 0 else None) as recorder:
        found = recorder.resume()
        work = opener(found, rank)
        trainee = work.trainee
        recorder.keep(work.keep)
        recorder.begin(trainee)
        if trainee.steps == 0 and found is None:  # what it starts from is its result
            recorder.save(trainee)

        def consumed(batch: Taken) -> None:
            recorder.consumed(batch.step, batch.epoch, batch.keys)
            alive(trainee.step)

        divergence = Divergence(trainee.name)

        def both(step: StepReport) -> None:
            recorder.report(step, int(time.time() * 1000))
            if rank.rank != 0:
                return
            report(step)
            warning = divergence.notice(step.step, step.gradient_norm)
            if warning is not None:
                say(warning)

        try:
            ended = train(
                trainee,
                work.batches,
                work.advance,
                save_every=work.save_every,
                save=lambda: recorder.save(trainee),
                report=both,
                consumed=consumed,
                rank=rank,
                stopping=stopping,
            )
        except LossNotFiniteError as error:
            if rank.rank == 0:
                recorder.wait()
                note_failure(files, error, step=error.step, terms=error.terms)
            raise
    return trainee, ended

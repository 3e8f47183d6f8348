"""What a failed training is said to have failed of, and whether it is tried again."""

import pickle

import pytest

from pipelines.reasons import final, reason
from sdn.data.reading import DamagedSample
from sdn.training import LossNotFiniteError


class GroupError(Exception):
    def __init__(self, failures):
        super().__init__("worker group failed")
        self.worker_failures = failures


class TaskError(Exception):
    def __init__(self, cause):
        super().__init__("a remote traceback of fifty lines")
        self.cause = cause


def test_reason_is_the_workers_first_cause():
    """Through groups of workers, remote wrappers and causes, the first one is found."""
    inner = FloatingPointError("loss not finite at step 3")
    chained = RuntimeError("while training")
    chained.__cause__ = inner
    error = GroupError({1: TaskError(TaskError(chained)), 0: ValueError("later")})
    assert reason(error) == "FloatingPointError: loss not finite at step 3"


def test_reason_of_a_plain_error():
    """An error with nothing below it is its own reason."""
    assert reason(ValueError("no such shard")) == "ValueError: no such shard"
    assert reason(GroupError({})) == "GroupError: worker group failed"
    assert reason(GroupError(None)) == "GroupError: worker group failed"


def test_reason_of_rays_own_errors():
    """What Ray raises for a failing task leads back to the error inside it."""
    from ray.exceptions import RayTaskError
    from ray.train import WorkerGroupError

    inner = ValueError("damaged shard")
    task = RayTaskError("train_rank", "Traceback ...", inner)
    assert reason(WorkerGroupError("1 worker failed", {0: task})) == "ValueError: damaged shard"


def test_the_telling_rank_goes_first():
    """Where one rank's fault makes the others lose their connection, its own is the reason."""
    lost = RuntimeError("Connection closed by peer")
    error = GroupError({0: lost, 1: ValueError("damaged shard"), 2: lost})
    assert reason(error) == "ValueError: damaged shard"
    assert final(error)


def test_a_full_disk_says_what_to_do():
    """No space left is named as such, and is not tried again."""
    error = GroupError({0: OSError(28, "No space left on device")})
    assert "the disk is full" in reason(error)
    assert "free some space" in reason(error)
    assert final(error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DamagedSample("train-0.tar", "a", "has another checksum"), True),
        (LossNotFiniteError(3, ("image",), "stage_one", "bf16"), True),
        (FileNotFoundError(2, "no such file"), True),
        (KeyError("x"), True),
        (ConnectionResetError(104, "reset"), False),
        (TimeoutError("S3 does not answer"), False),
        (RuntimeError("Connection closed by peer"), False),
        (MemoryError(), False),
    ],
)
def test_what_would_come_again_is_final(error, expected):
    """Wrong input and config are not tried again; what time or another node may mend is."""
    assert final(GroupError({0: error})) is expected


def test_what_ranks_raise_crosses_to_the_driver():
    """A loss that is not finite keeps step, terms and advice when it is pickled."""
    error = LossNotFiniteError(7, ("image", "conv1_1"), "stage_two", "bf16")
    again = pickle.loads(pickle.dumps(error))
    assert (again.step, again.terms, str(again)) == (7, ("image", "conv1_1"), str(error))
    for words in ("step 7", "image, conv1_1", "stage_two.rate", "stage_two.precision=float32"):
        assert words in str(error)

import threading

import pytest
from ray import cloudpickle

from pipelines.launch import _trial_listener, choose_weights
from pipelines.reasons import TrainingError
from sdn.config import TAP_GROUPS, LossWeights

OWN = LossWeights(taps={"conv1_2": 9.0})
"""The recipe's; a single tap's weight is not the search's business."""


def trials(*scores):
    """Trials with these scores; number n has all weights n + 1."""
    return [
        {
            "weights": dict.fromkeys(TAP_GROUPS, n + 1.0),
            "score": score,
            "error": None if score is not None else f"ValueError: trial {n}",
        }
        for n, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("scores", "margin", "number"),
    [
        ((0.5, 0.7, 0.6), 0.0, 1),
        ((0.5, 0.7, 0.9), 0.0, 2),
        ((0.5, 0.4, 0.3), 0.0, 0),
        ((0.5, 0.5, 0.5), 0.0, 0),
        ((0.5, 0.7, 0.6), 0.3, 0),
        ((0.5, 0.75, 0.6), 0.25, 0),
        ((0.5, 0.76, 0.6), 0.25, 1),
        ((0.5, 0.7, 0.7), 0.0, 1),
        ((-0.5, -0.7, -0.4), 0.0, 2),
        ((0.0, -0.1), 0.0, 0),
        ((0.5, None, 0.6), 0.0, 2),
        ((0.5, None, None), 0.0, 0),
        ((None, 0.1, 0.2), 0.0, 2),
        ((None, 0.1, 0.2), 9.0, 2),
        ((0.5,), 0.0, 0),
    ],
)
def test_best_wins_beyond_the_margin(scores, margin, number):
    """The best trial wins beyond the margin, the defaults stay within it, failures never win."""
    weights, chosen = choose_weights(trials(*scores), margin, OWN)
    assert chosen == number
    assert weights == LossWeights(**dict.fromkeys(TAP_GROUPS, number + 1.0), taps=OWN.taps)


def test_all_trials_failed():
    """Where no trial has a score, the reasons of all are given."""
    with pytest.raises(TrainingError, match="no trial of the search succeeded") as caught:
        choose_weights(trials(None, None), 0.0, OWN)
    assert "ValueError: trial 0" in str(caught.value)
    assert "ValueError: trial 1" in str(caught.value)


def test_what_listens_to_trials_is_not_kept_with_the_experiment():
    """Tune pickles its callbacks; a listener that holds a lock (an S3 client, say) is left out."""
    heard, lock = [], threading.Lock()

    def listen(kind, values):
        with lock:
            heard.append((kind, values["score"]))

    class Trial:
        config: dict = {}  # noqa: RUF012
        last_result = {"score": 0.5}  # noqa: RUF012

    callback = _trial_listener(listen)
    cloudpickle.loads(cloudpickle.dumps(callback)).on_trial_complete(1, [], Trial())
    assert heard == []
    callback.on_trial_complete(1, [], Trial())
    callback.on_trial_error(1, [], Trial())
    assert heard == [("trial", 0.5), ("trial", None)]

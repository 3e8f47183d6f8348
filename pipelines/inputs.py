"""What a run reads that others own, looked at before anything is begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.preparing import check_source

if TYPE_CHECKING:
    from pipelines.run import Run


def check_inputs(run: Run) -> None:
    """Refuse images and weight files that the run could not read, hours before it needs them.

    What has a URL is not fetched: a run whose stages are done reads it no more.

    Raises:
        ValueError: there are no images where they should be, or a weight file is not what the
            config says.
        FileNotFoundError: no such weight file.
        OSError: the place of the images cannot be reached.
    """
    check_source(run.config.data, run.settings)
    teacher, scores = run.config.teacher, run.config.evaluation
    if teacher.weights is not None and "://" not in teacher.weights:
        from sdn.teacher import load_weights  # torch, which most refusals have no need of

        load_weights(teacher)
    if scores.features == "inception" and "://" not in scores.inception:
        from sdn.features.inception import open_inception

        open_inception(scores.inception, scores.inception_sha256)

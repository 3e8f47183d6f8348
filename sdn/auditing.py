"""Each training's ledger against the data set that it was to consume."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdn.data.dataset import open_dataset
from sdn.ledger import Audit, audit
from sdn.stage_run import keys_of, stage_plan

if TYPE_CHECKING:
    from pathlib import Path

    from sdn.config import RunConfig
    from sdn.data.dataset import DataSet
    from sdn.data.files import Files


def audit_training(
    name: str, config: RunConfig, data: DataSet | Files | Path, files: Files, steps: int
) -> Audit:
    """What the ledger proves of a training up to a step.

    Args:
        name: "teacher", "captions", "stage_one" or "stage_two".
        config: of the run.
        data: prepared data set.
        files: the place of the training.
        steps: of its last checkpoint.

    Raises:
        ValueError: a file of the ledger is damaged.
        DamagedSample: an index of the data set is not what was written.
    """
    dataset = open_dataset(data)
    left_out = 0
    if name.startswith("stage"):
        steps_per_epoch = stage_plan(config, getattr(config, name), dataset).steps_per_epoch
    else:  # a fit takes whole batches only
        samples = dataset.samples("train")
        batch = min(getattr(config, name).batch, samples)
        steps_per_epoch, left_out = divmod(samples, batch)
    return audit(
        files,
        keys_of(dataset, "train"),
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        left_out=left_out,
    )

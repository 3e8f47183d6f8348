"""What in a config does not fit together, where its parts cannot see it when they are made.

`sdn.config` knows no taps: both are at the bottom, and neither imports the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdn.taps import blocks_of, check_taps

if TYPE_CHECKING:
    from sdn.config import RunConfig


def check_config(config: RunConfig) -> None:
    """Refuse, before anything is trained, what a later stage could not do.

    Raises:
        ValueError: critics of taps that the teacher lacks.
    """
    if config.stage_three.epochs:
        blocks = blocks_of(config.teacher.arch, config.teacher.width)
        check_taps(blocks, config.stage_three.critics, "stage_three.critics")

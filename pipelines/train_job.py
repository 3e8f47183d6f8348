"""The driver of a stage's training inside a Ray Job: `python -m pipelines.train_job`.

The order comes in the environment (see `pipelines.jobs`). What it has to say goes into the
training's place, where whoever follows the job reads it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from pipelines.jobs import EVENTS, ORDER
from pipelines.settings import Settings, job_order


def main() -> None:
    """Train the order to its end."""
    from pipelines.cluster import start_ray, stop_ray
    from pipelines.dropped_signals import heard_again
    from pipelines.supervising import read_order, train_stage
    from sdn.journal import Journal

    order = read_order(job_order(ORDER).encode())
    start_ray(Settings(ray_address="auto"))
    place = order.place()
    # Later jobs of the same training count on from the time, so that none overwrites another.
    number = int(time.time())
    with heard_again(), Journal(place, f"{EVENTS}/{number}", every_s=1.0) as journal:

        def listen(kind: str, values: dict[str, Any]) -> None:
            nonlocal number
            if kind != "step":  # the ranks write those down themselves
                number += 1
                journal.add(number, {"kind": kind, "values": values})

        try:
            train_stage(order, listen=listen)
        except Exception as error:
            listen("error", {"text": str(error)})
            journal.flush()
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from error
        finally:
            stop_ray()


if __name__ == "__main__":
    main()

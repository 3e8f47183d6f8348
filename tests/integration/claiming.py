"""What the processes do that the tests of the succession start, race and kill."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import mlflow

from pipelines.succession import Succession

if TYPE_CHECKING:
    from collections.abc import Sequence


class Killing:
    """A client whose process gets SIGKILL after k requests."""

    def __init__(self, client: mlflow.MlflowClient, requests: int) -> None:
        self.client, self.left = client, requests

    def __getattr__(self, name: str) -> Any:
        request = getattr(self.client, name)

        def killing(*args: str) -> Any:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return request(*args)

        return killing


def operate(uri: str, name: str, what: str, requests: int, ready: Any = None) -> None:
    """Version 3 becomes the champion, or the champion is rolled back; killed after k requests.

    Args:
        uri: of MLflow.
        name: of the registered model.
        what: `succeed` or `roll back`.
        requests: k.
        ready: an event that is set before the first request.
    """
    client = mlflow.MlflowClient(uri, uri)
    client.get_registered_model(name)  # opens the database
    if ready is not None:
        ready.set()
    succession = Succession(Killing(client, requests), name)  # type: ignore[arg-type]
    if what == "succeed":
        succession.succeed("3", lambda _: (True, "better"))
    else:
        succession.roll_back(lambda _: None, "why")


def higher(challenger: str, holder: str | None) -> bool:
    """A comparison with one right answer: the higher number is better."""
    return int(challenger) > int(holder or 0)


def race(uri: str, name: str, versions: Sequence[str], at: float) -> list[dict[str, Any]]:
    """Each version in a thread of its own; all begin at the same moment.

    Args:
        uri: of MLflow.
        name: of the registered model.
        versions: the challengers.
        at: seconds since 1970.

    Returns:
        For each challenger whether it won, in which term, and with whom it was compared.
    """
    client = mlflow.MlflowClient(uri, uri)

    def finish(version: str) -> dict[str, Any]:
        compared: list[str | None] = []

        def better_than(holder: str | None) -> tuple[bool, str]:
            compared.append(holder)
            return higher(version, holder), f"against {holder}"

        time.sleep(max(0.0, at - time.time()))
        found = Succession(client, name).succeed(version, better_than)
        term = found.term.number if found.champion and found.term is not None else None
        return {"version": version, "term": term, "compared": compared}

    with ThreadPoolExecutor(len(versions)) as pool:
        return list(pool.map(finish, versions))

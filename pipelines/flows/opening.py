"""How a flow begins: what its form means is resolved and shown, or refused with the reason."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from pipelines.cluster import stop_ray
from pipelines.flows.form import changes_of
from pipelines.flows.last_words import ended_in_time
from pipelines.flows.pulse import living
from pipelines.flows.showing import show_config, show_refusal
from pipelines.flows.stages import Progress, terminal
from pipelines.inputs import check_inputs
from pipelines.left_locks import locks_given_back
from pipelines.orphans import ended_with_this_process
from pipelines.run import Run, RunSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.settings import Settings


def open_run(
    recipe: str, store: str, changes: list[str], weights_from: str = "", **fields: Any
) -> Run:
    """The run that a form asks for, its resolved config the first artifact.

    Args:
        recipe, store, changes, weights_from: as in `RunSpec`; "" for what is configured.
        fields: the others, see `pipelines.flows.form.KEYS`.

    Raises:
        ValueError, OSError: a combination that cannot work, or no images or weights where they
            should be; it is the first artifact, too.
        StoreError: the store cannot be used.
    """
    asked = {"recipe": recipe, "store": store, "weights_from": weights_from, "changes": changes}
    with refused(asked | fields):
        overrides = changes_of(fields, changes)
        if weights_from and fields.get("search_trials"):
            raise ValueError(
                "weights_from takes what an earlier search found and searches no more, but "
                f"search_trials is {fields['search_trials']}: leave one of them out"
            )
        run = RunSpec(recipe, overrides, store or None, weights_from or None).open(Progress())
        if terminal.get() is None:  # the command line has looked before it started a server
            check_inputs(run)
    show_config(run)
    run.store.check()
    return run


@contextmanager
def refused(asked: dict[str, Any]) -> Iterator[None]:
    """What is wrong with what was asked for is shown in place of the config."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:  # of a store or registry, too
        show_refusal(asked, str(error))
        raise


@contextmanager
def own_ray(settings: Settings) -> Iterator[None]:
    """Ray ends with what is done inside, however that ends; the flow run keeps its record."""
    # The command line guards all it starts; in a worker's process only Ray is started here.
    guard = ended_with_this_process() if terminal.get() is None else nullcontext()
    with guard, living(settings):
        try:
            with ended_in_time(), locks_given_back():
                yield
        finally:
            stop_ray()

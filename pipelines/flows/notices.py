"""What people are told of by the flows: failures, decisions about versions, trouble with data."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect.utilities.urls import url_for

from pipelines.dropped_signals import heard_again
from pipelines.flows.last_words import ended_in_time, not_counted
from pipelines.leaving_out import never_raising
from pipelines.masking import masked_errors
from pipelines.notifying import notify, notify_of_version
from pipelines.settings import Settings
from pipelines.tracking_place import public_uri, tracking_uri, version_page

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

    from pipelines.flows.stages import Tracked
    from pipelines.run import Done, Run
    from sdn.data.dead_letters import TooManyDeadLetters

P = ParamSpec("P")
R = TypeVar("R")
_TOLD = "sdn.told"
"""Tag of a version: people were told of the decision about it."""


def failed(flow: Flow[..., Any], run: FlowRun, state: State[Any]) -> None:
    """Hook of a flow: it failed or crashed, and Prefect knows."""
    settings = settings_of(run.parameters)
    title = f"{flow.name} {state.type.value.lower()}: {run.name}"
    with not_counted():
        tell_of_run(settings, run.id, title, state.message or "no reason was given")


HOOKS: dict[str, Any] = {"on_failure": [failed], "on_crashed": [failed]}
"""For `flow(...)`: whoever fails is told of."""


def guarding(function: Callable[P, R]) -> Callable[P, R]:
    """The function of a flow: signals end it, and its process in time; its errors leave it masked.

    States and logs keep the texts of errors.
    """
    found = ended_in_time()(masked_errors()(heard_again()(function)))
    # Among the names of the module of what wraps it Prefect would not find the types of fields.
    found.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return found


def tell_of_run(settings: Settings, run: UUID, title: str, text: str) -> None:
    """Tell of the end of a flow run that did not end well; once, whoever sees it first."""
    notify(settings, "failure", title, text, run_page(settings, run), key=f"run-{run}")


def tell_of_letters(run: Run, error: TooManyDeadLetters, flow_run: UUID | str | None) -> None:
    """Tell that too much of the data cannot be used; the failure that follows is the same event."""
    notify(
        run.settings,
        "data",
        f"{run.config.name}: too many dead letters",
        f"{error}\n`sdn data letters` lists them.",
        run_page(run.settings, flow_run),
        key=None if flow_run is None else f"run-{flow_run}",
    )


def tell_of_arrival(run: Run, report: Done, flow_run: UUID | str | None) -> None:
    """Tell of a version of a data set that came with dead letters, or differs beyond chance."""
    from pipelines.data_report import differs, told  # torch, which a rollback has no need of

    found = report.result
    if not found["dead_letters"] and not differs(found):
        return
    title = f"{found['place']}: version {found['version']} needs a look"
    page = run_page(run.settings, flow_run)
    notify(run.settings, "data", title, "\n".join(told(found)), page, key=report.key)


def tell_of_decision(
    run: Run, tracked: Tracked, registered: dict[str, Any], compared: Done, report: str
) -> None:
    """Tell whether a version became the champion; once for each version."""
    name, number = registered["name"], registered["version"]
    client = tracked.tracker.client
    with never_raising("the notice of the decision"):
        if _TOLD in client.get_model_version(name, number).tags:
            return
        notify_of_version(
            run.settings,
            name,
            number,
            f"Compared with {compared.result['champion']}. {registered['reason']}",
            version_page(run.settings, name, number) or report,
            promoted=registered["champion"],
            key=f"version-{name}-{number}",
        )
        client.set_model_version_tag(name, number, _TOLD, "true")


def run_page(settings: Settings, run: UUID | str | None) -> str:
    """Prefect's page of a flow run; without a server MLflow's, without that the store."""
    if run is not None:
        found = url_for("flow-run", obj_id=run)
        if found:
            return str(found)
    uri = public_uri(tracking_uri(settings))
    return uri if uri.startswith("http") else settings.local.as_uri()


def settings_of(parameters: dict[str, Any]) -> Settings:
    """The settings of a flow run with these parameters."""
    store = parameters.get("store")
    return Settings(store=store) if store else Settings()

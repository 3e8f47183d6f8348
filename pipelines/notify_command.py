"""`sdn notify`: a notice by hand, to see where notices go."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.terminal import StoreOption, expected_errors, quiet, say


def notify(
    text: Annotated[str, typer.Argument(help="What to say.")] = "This is a test.",
    store: StoreOption = None,
) -> None:
    """Send a notice to SDN_NOTIFY_COMMAND and SDN_NOTIFY_URL, as a flow that failed would."""
    with expected_errors():
        quiet()
        import uuid

        from pipelines import notifying
        from pipelines.settings import Settings

        settings = Settings() if store is None else Settings(store=store)
        if settings.notify_command is None and settings.notify_url is None:
            raise ValueError("nobody is told of anything: set SDN_NOTIFY_COMMAND or SDN_NOTIFY_URL")
        link = settings.local.as_uri()
        if not notifying.notify(
            settings, "failure", "sdn notify", text, link, key=uuid.uuid4().hex
        ):
            raise ValueError("the notice could not be delivered; the warning above says why")
        say("delivered")

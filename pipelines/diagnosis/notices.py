"""Whom notices go to: a command that can be run, an address that can be asked."""

from __future__ import annotations

import shlex
import shutil
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipelines.diagnosis.check import Check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.settings import Settings


def look_at_notices(settings: Settings) -> Iterator[Check]:
    """What can be known without telling anybody; `sdn notify` tries it."""
    command, url = settings.notify_command, settings.notify_url
    if command is None and url is None:
        found = "nobody is told (neither SDN_NOTIFY_COMMAND nor SDN_NOTIFY_URL is set)"
        yield Check(ok=True, what="notices", found=found)
    if command is not None:
        yield _command(command)
    if url is not None:
        yield _address(url.get_secret_value())


def _command(command: str) -> Check:
    """Its program is there, and this account may run it; its arguments are not shown."""
    try:
        program = next(iter(shlex.split(command)), "")
    except ValueError as error:
        return Check(
            ok=False,
            what="notices by command",
            found=f"SDN_NOTIFY_COMMAND cannot be split into words: {error}",
            remedy="close its quotes: it is read as a shell reads words, and run without one",
        )
    ok = shutil.which(program) is not None
    return Check(
        ok=ok,
        what="notices by command",
        found=f"{program or 'SDN_NOTIFY_COMMAND'} can{'' if ok else 'not'} be run",
        remedy="SDN_NOTIFY_COMMAND is to begin with a program on the PATH or the whole path of one "
        "(chmod +x); it is run without a shell, so no ~, pipe or variable; then `sdn notify hello`",
    )


def _address(url: str) -> Check:
    """It has a scheme and a host; what else is in it is a credential."""
    parts = urlsplit(url)
    ok = parts.scheme in {"http", "https"} and bool(parts.hostname)
    return Check(
        ok=ok,
        what="notices by URL",
        found=f"{parts.hostname}, not tried" if ok else "SDN_NOTIFY_URL is no address of HTTP",
        remedy="set SDN_NOTIFY_URL to the whole address, https://..., then `sdn notify hello`",
    )

"""Tells people what happened: by a command of theirs, or by a message to a URL of theirs.

Never raises into the work it tells of, never says a credential, and says the same thing once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import signal
import subprocess
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import httpx
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

from pipelines.masking import public
from pipelines.settings import credentials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipelines.settings import Settings

logger = logging.getLogger(__name__)
Kind = Literal["failure", "promotion", "rejection", "data"]

WAYS = ("command", "url")
MARKS = "notified"
"""Folder on this machine with a mark of each notice that was delivered."""
COMMAND_S = 30.0
"""What the command may take, in seconds."""
_REQUEST_S = 10.0
_TRIES = 4
_BUSY = 429
_LONGEST = 3000
"""Characters of a text; Slack takes 3001 in a section."""


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What people are told."""

    kind: Kind
    title: str
    text: str
    link: str
    """Where to read on; "" where there is no page."""
    key: str
    """The same for the same event."""


def notify(
    settings: Settings,
    kind: Kind,
    title: str,
    text: str,
    link: str | None = None,
    *,
    key: str | None = None,
) -> bool:
    """Send a notice to wherever `SDN_NOTIFY_COMMAND` and `SDN_NOTIFY_URL` say, once.

    Args:
        settings: where to, and where marks are kept.
        kind: of the event.
        title: one line.
        text: what happened, and what to do.
        link: page to read on.
        key: of the event; one that was told of is not told of again from this machine. By default
            a digest of all the rest.

    Returns:
        Whether it was delivered now to at least one of them. Nothing is raised.
    """
    hidden = credentials()
    if settings.notify_url is not None:
        hidden.append(settings.notify_url.get_secret_value())
    named = key or hashlib.sha256(repr((kind, title, text, link)).encode()).hexdigest()[:32]
    notice = Notice(
        kind=kind,
        title=public(title, hidden),
        text=public(text, hidden)[:_LONGEST],
        link=public(link or "", hidden),
        key=named,
    )
    ways: dict[str, Callable[[Notice], None]] = {}
    if settings.notify_command:
        command = settings.notify_command
        ways[WAYS[0]] = lambda told: _run(command, told)
    if settings.notify_url is not None:
        url = settings.notify_url.get_secret_value()
        ways[WAYS[1]] = lambda told: _post(url, told)
    delivered = [_once(settings, way, send, notice) for way, send in ways.items()]
    return any(delivered)


def notify_of_version(
    settings: Settings,
    name: str,
    version: str,
    text: str,
    link: str,
    *,
    promoted: bool,
    key: str | None,
) -> bool:
    """Tell what was decided about a version of a model.

    Args:
        settings: where to.
        name: of the registered model.
        version: of it.
        text: what it was compared with, and why.
        link: where to look.
        promoted: whether it is the champion now.
        key: as for `notify`.

    Returns:
        As `notify`.
    """
    title = f"{name} version {version} is {'champion' if promoted else 'not promoted'}"
    return notify(settings, "promotion" if promoted else "rejection", title, text, link, key=key)


def forget(settings: Settings, key: str) -> None:
    """Let an event of this key be told of again, as of something that is tried once more."""
    with suppress(OSError):
        for way in WAYS:
            _mark(settings, way, key).unlink(missing_ok=True)


def _mark(settings: Settings, way: str, key: str) -> Path:
    """File that says: this was told this way."""
    return settings.local / MARKS / hashlib.sha256(f"{way} {key}".encode()).hexdigest()[:40]


def _once(settings: Settings, way: str, send: Callable[[Notice], None], notice: Notice) -> bool:
    """Send unless it was sent; a mark is claimed first, and taken back where sending fails."""
    mark, claimed = _mark(settings, way, notice.key), False
    try:
        with suppress(OSError):  # a full disk keeps nobody from being told of it
            mark.parent.mkdir(parents=True, exist_ok=True)
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                return False
            claimed = True
        send(notice)
    except Exception as error:  # noqa: BLE001 (whatever a command or a server of others does)
        # No text of the error: the address of a hook is a credential by itself.
        logger.warning("%s: the notice by %s failed (%s)", notice.title, way, _reason(error))
        if claimed:
            with suppress(OSError):
                mark.unlink()
        return False
    return True


def _reason(error: Exception) -> str:
    """Why a notice could not be delivered, without any address."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.request.url.host} answered {error.response.status_code}"
    if isinstance(error, httpx.HTTPError):
        return type(error).__name__
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no end within {error.timeout:.0f} s"
    return error.strerror or "?" if isinstance(error, OSError) else type(error).__name__


def _run(command: str, notice: Notice) -> None:
    """Run the user's command, without a shell: JSON comes in, and the fields as variables."""
    fields = asdict(notice)
    variables = {f"SDN_NOTICE_{name.upper()}": value for name, value in fields.items()}
    argv = shlex.split(command)
    with subprocess.Popen(  # noqa: S603 (it is the user's own)
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | variables,
        start_new_session=True,
    ) as process:
        try:
            process.communicate(json.dumps(fields).encode(), timeout=COMMAND_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv[:1])


def _worth_another_try(error: BaseException) -> bool:
    """Whether a request that failed may succeed later."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.is_server_error or error.response.status_code == _BUSY
    return isinstance(error, httpx.TransportError) and not isinstance(
        error, httpx.UnsupportedProtocol
    )


@retry(
    retry=retry_if_exception(_worth_another_try),
    wait=wait_exponential(0.5, max=5),
    stop=stop_after_attempt(_TRIES),
    reraise=True,
)
def _post(url: str, notice: Notice) -> None:
    """POST the notice as JSON; `text` holds all of it, as Slack and its likes read it."""
    whole = "\n".join(part for part in (notice.title, notice.text, notice.link) if part)
    content = {**asdict(notice), "detail": notice.text, "text": whole}
    with _unlogged(url):
        httpx.post(url, json=content, timeout=_REQUEST_S).raise_for_status()


@contextmanager
def _unlogged(url: str) -> Iterator[None]:
    """The library logs the address of each request, which is a credential here."""
    place = urlsplit(url).hostname or "?"

    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(url, f"{place}/***"), ()
        return True

    log = logging.getLogger("httpx")
    log.addFilter(hide)
    try:
        yield
    finally:
        log.removeFilter(hide)

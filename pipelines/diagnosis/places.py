"""The store, the clock of its server, the landing place of new data and what grows from it."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from pipelines.diagnosis.check import Check
from pipelines.store import StoreError, open_files, open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.settings import Settings

_APART_S = 300
"""S3 refuses requests whose time is a quarter of an hour off."""


def look_at_store(settings: Settings) -> Iterator[Check]:
    """Whether results can be written."""
    endpoint = settings.s3_endpoint
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        yield Check(
            ok=False,
            what="store",
            found=f"SDN_S3_ENDPOINT={endpoint}",
            remedy=f"it needs a scheme: http://{endpoint} or https://{endpoint}",
        )
        return
    if settings.store.startswith("s3://"):
        apart = None if endpoint is None else seconds_apart(endpoint)
        if apart is not None:
            yield clock(apart, endpoint or "")
        yield _written_to(settings)
        return
    try:
        store = open_store(settings.store, settings.cache, endpoint)
        store.check()
    except (StoreError, OSError) as error:
        yield Check(ok=False, what="store", found=settings.store, remedy=str(error))
        return
    yield Check(ok=True, what="store", found=f"{store.uri}, writable")


def _written_to(settings: Settings) -> Check:
    """A probe object is written and removed; what is refused has a reason of its own."""
    uri = settings.store
    try:
        open_files(uri, settings.cache, settings.s3_endpoint).prepare()
    except (ValueError, OSError) as error:
        return Check(ok=False, what="store", found=uri, remedy=str(error))
    return Check(ok=True, what="store", found=f"{uri}, writable")


def look_at_landing(settings: Settings) -> Iterator[Check]:
    """Whether new data can be read, where a landing place is named."""
    landing = settings.landing
    if landing is None:
        return
    try:
        place = open_files(landing, settings.cache, settings.s3_endpoint)
        if "://" not in landing and not _listable(landing):
            raise PermissionError(f"{landing} is no folder that this account may list")
        next(iter(place.walk()), None)
    except (StoreError, OSError) as error:
        remedy = "correct SDN_LANDING, or let this account read there"
        yield Check(ok=False, what="landing place", found=str(error), remedy=remedy)
        return
    yield Check(ok=True, what="landing place", found=f"{landing}, readable")
    yield _growing(landing, settings)


def _growing(landing: str, settings: Settings) -> Check:
    """Whether the data set that grows from there can be written, and lies elsewhere."""
    from pipelines.ingesting import LandingError, refuse_nested

    what, place = "data set", settings.grown
    try:
        refuse_nested(landing, place)
    except LandingError as error:
        return Check(ok=False, what=what, found=place, remedy=f"{error} (SDN_DATASET)")
    try:
        if "://" in place:
            open_files(place, settings.cache, settings.s3_endpoint).prepare()
        else:
            _require_writable(place)
    except (StoreError, ValueError, OSError) as error:
        remedy = "correct SDN_DATASET, or let this account write there"
        return Check(ok=False, what=what, found=str(error), remedy=remedy)
    return Check(ok=True, what=what, found=f"{place}, writable")


def _require_writable(folder: str) -> None:
    """Raise if it, or the nearest folder above it that is there, cannot be written.

    Nothing is made there: a data set that has not begun is no folder yet.
    """
    import os
    from pathlib import Path

    path = Path(folder).expanduser().resolve()
    while not path.exists():
        path = path.parent
    if not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
        raise PermissionError(f"{path} is no folder that this account may write to")


def _listable(folder: str) -> bool:
    import os
    from pathlib import Path

    path = Path(folder).expanduser()
    return path.is_dir() and os.access(path, os.R_OK | os.X_OK)


def seconds_apart(url: str) -> float | None:
    """How far a server's clock is ahead of this machine's; None where it does not say.

    Args:
        url: any address of it, an error page too.
    """
    import httpx

    try:
        date = httpx.get(url, timeout=5).headers.get("date")
    except httpx.HTTPError:
        return None  # that it does not answer has a line of its own
    try:
        return None if date is None else parsedate_to_datetime(date).timestamp() - time.time()
    except ValueError:
        return None


def clock(apart_s: float, where: str) -> Check:
    """The check of a clock that is this far ahead."""
    return Check(
        ok=abs(apart_s) < _APART_S,
        what="clock",
        found=f"{where} is {abs(apart_s):.0f} s {'ahead' if apart_s > 0 else 'behind'}",
        remedy="set the clocks by NTP (timedatectl set-ntp true): S3 refuses what is signed at "
        "another time",
    )

"""Variables that mislead: malformed or misspelt ones, proxies before this machine, many threads."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

from pydantic import ValidationError

from pipelines.cluster import cores
from pipelines.diagnosis.check import Check
from pipelines.settings import Settings, known_variables, sdn_variables, threads_variable

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCAL = "127.0.0.1"


def readable(store: str | None) -> Settings:
    """The settings, with the default in the place of each that cannot be read.

    Args:
        store: overrides the configured one.
    """
    given: dict[str, Any] = {} if store is None else {"store": store}
    fields = Settings.model_fields
    broken = {name: fields[name].default for name in _unreadable() if name in fields}
    return Settings(**broken, **given)


def malformed() -> Iterator[Check]:
    """A line for each variable whose value cannot be read; values are not repeated."""
    for name, reason in _unreadable().items():
        variable = f"SDN_{name.upper()}"
        about = Settings.model_fields[name].description or ""
        yield Check(
            ok=False,
            what=variable,
            found=reason,
            remedy=f"correct {variable}, or unset it: {about}",
        )
    try:
        _ = readable(None).credentials
    except ValueError as error:
        yield Check(ok=False, what="SDN_AUTH", found="it cannot be used", remedy=str(error))


def _unreadable() -> dict[str, str]:
    """Field -> what is wrong with the value that the environment gives it."""
    try:
        Settings()
    except ValidationError as error:
        return {str(one["loc"][0]): one["msg"] for one in error.errors(include_input=False)}
    return {}


def look_at_environment(settings: Settings) -> Iterator[Check]:
    """Variables that a run would stumble over without a word."""
    known = known_variables()
    unknown = [name for name in sdn_variables() if name not in known]
    meant = {name: next(iter(get_close_matches(name, known, 1)), "") for name in unknown}
    told = [
        f"{n} (did you mean {m}?)" if m else f"{n} (nothing reads it)" for n, m in meant.items()
    ]
    yield Check(
        ok=not unknown,
        what="variables",
        found="; ".join(told) or "every SDN_* variable is known",
        remedy="correct the name, or unset it: it has no effect",
    )
    proxies = {kind: url for kind, url in getproxies().items() if kind in {"http", "all"}}
    caught = bool(proxies) and not proxy_bypass(_LOCAL)
    yield Check(
        ok=not caught,
        what="proxies",
        found=f"{'HTTP_PROXY' if 'http' in proxies else 'ALL_PROXY'} catches {_LOCAL}"
        if caught
        else "none between this machine and itself",
        remedy=f"add {_LOCAL},localhost to NO_PROXY: servers of this machine are asked for there",
    )
    threads = threads_variable()
    room = cores(settings)
    too_many = threads is not None and (not threads.isdigit() or int(threads) > room)
    yield Check(
        ok=not too_many,
        what="threads",
        found="chosen for each process" if threads is None else f"OMP_NUM_THREADS={threads}",
        remedy=f"unset OMP_NUM_THREADS, or set it to 1..{room}: two processes with more threads "
        "than cores run ten times slower",
    )

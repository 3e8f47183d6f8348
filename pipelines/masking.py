"""Texts as they may be shown: without credentials."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PASSWORDS = (
    re.compile(r"(?P<before>://[^\s:@/]*:)[^\s@]+(?=@)"),
    re.compile(r"(?P<before>https?://)[^\s:@/]+(?=@)"),  # a token in place of user and password
    re.compile(
        r"(?P<before>[?&][\w-]*(?:password|passwd|pwd|token|secret|signature)=)[^&\s'\")]+",
        re.IGNORECASE,
    ),
)
_USERS = re.compile(r"(?<=://)[^\s@/]*@")


def masked(text: str, hidden: Iterable[str] | None = None) -> str:
    """The text with *** in place of each password that an address in it has, and of credentials.

    Args:
        text: an address such as `postgresql://user:password@host/name`, or a sentence with one.
        hidden: what is a credential wherever it stands; by default what variables hold in secret.
    """
    if hidden is None:
        from pipelines.settings import credentials

        hidden = credentials()
    for value in sorted(hidden, key=len, reverse=True):
        text = text.replace(value, "***")
    for pattern in _PASSWORDS:
        text = pattern.sub(r"\g<before>***", text)
    return text


def public(text: str, hidden: Iterable[str] | None = None) -> str:
    """The masked text without the users of addresses, too, as everybody may read it."""
    return _USERS.sub("", masked(text, hidden))


@contextmanager
def masked_errors() -> Iterator[None]:
    """What is raised inside leaves masked; also a decorator, as of flows and their tasks.

    Prefect keeps an error's text as the state of a run and writes it to the log with those that it
    came from, such as MLflow's, which repeat the address that was asked.
    """
    try:
        yield
    except Exception as error:
        _mask(error, set())
        raise


def _mask(error: BaseException, seen: set[int]) -> None:
    """Mask an error, those it was made of and those it came from, in place."""
    if id(error) in seen:
        return
    seen.add(id(error))
    error.args = tuple(masked(one) if isinstance(one, str) else one for one in error.args)
    if isinstance(error, OSError) and error.strerror:  # what its text is made of
        error.strerror = masked(error.strerror)
    own = getattr(error, "__dict__", {})  # MLflow's errors have their text here, too
    own.update({name: masked(value) for name, value in own.items() if isinstance(value, str)})
    for other in (*error.args, *own.values(), error.__cause__, error.__context__):
        if isinstance(other, BaseException):
            _mask(other, seen)

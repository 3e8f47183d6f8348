"""Texts as they may be shown: an address's password is left out."""

from __future__ import annotations

import re

_PASSWORDS = (
    re.compile(r"(?P<before>://[^\s:@/]*:)[^\s@]+(?=@)"),
    re.compile(r"(?P<before>[?&](?:password|passwd|sslpassword)=)[^&\s'\"]+"),
)


def masked(text: str) -> str:
    """The text with *** in place of each password that an address in it has.

    Args:
        text: an address such as `postgresql://user:password@host/name`, or a sentence with one.
    """
    for pattern in _PASSWORDS:
        text = pattern.sub(r"\g<before>***", text)
    return text

"""How a config refuses a value."""

from __future__ import annotations


def require(condition: bool, text: str) -> None:
    """Refuse what does not hold.

    Raises:
        ValueError: with this text.
    """
    if not condition:
        raise ValueError(text)

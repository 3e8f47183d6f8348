"""How a config refuses a value."""

from __future__ import annotations


def require(condition: bool, text: str) -> None:
    """Refuse what does not hold.

    Args:
        condition: what must hold.
        text: begins with the field's own name; `from_dict` puts that of its group before it.

    Raises:
        ValueError: with this text.
    """
    if not condition:
        raise ValueError(text)

"""Stage keys: one digest that says what a stage does, what it reads, and where its result lies."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from sdn import METHOD_VERSION


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of one run."""

    name: str
    config: Any
    """Its part of the resolved config, as JSON values; nothing else may change its result."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Role -> key of the stage, or digest of the data or weights, that is read."""

    @property
    def key(self) -> str:
        """SHA-256 in hexadecimal over name, config, inputs and the method's version."""
        content = {
            "stage": self.name,
            "config": self.config,
            "inputs": self.inputs,
            "method": METHOD_VERSION,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def short(self) -> str:
        """Name and the beginning of the key: Ray's run name, and the folder in the store."""
        return f"{self.name}-{self.key[:16]}"

    @property
    def folder(self) -> str:
        """Where the result lies in the store."""
        return f"stages/{self.short}"

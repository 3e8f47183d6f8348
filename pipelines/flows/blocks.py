"""The blocks that come with Prefect, for its page: `python -m pipelines.flows.blocks`.

Prefect's server registers them before it answers for the first time, which takes a fifth of its
first start; `sdn up` has it begin without, and does it afterwards.
"""

from __future__ import annotations

import importlib

from prefect.blocks.core import Block
from prefect.utilities.dispatch import get_registry_for_type

_MODULES = (
    "prefect.blocks.notifications",
    "prefect.blocks.system",
    "prefect.blocks.webhook",
    "prefect.filesystems",
)


def main() -> None:
    """Register each, or bring it up to date."""
    for module in _MODULES:
        importlib.import_module(module)
    for block in (get_registry_for_type(Block) or {}).values():
        block.register_type_and_schema()


if __name__ == "__main__":
    main()

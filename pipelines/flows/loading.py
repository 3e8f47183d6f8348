"""`prefect deploy`, told what to deploy once its flows are loaded: a server can start meanwhile.

`python -m pipelines.flows.loading MODULE...`: the modules first, then the deployments of the file
whose path is the first line of standard input; nothing where that ends without one.
"""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """See above."""
    importlib.import_module("prefect.cli.deploy")
    for module in sys.argv[1:]:
        importlib.import_module(module)
    if path := sys.stdin.readline().strip():
        from prefect.cli import app

        sys.argv = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", path]
        app()


if __name__ == "__main__":
    main()

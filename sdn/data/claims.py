"""Who may write into a place, and what a run that was cut off has left there."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from sdn.data.manifest import Manifest, make_newest, read_manifest, version_file
from sdn.data.parts import UNFINISHED
from sdn.data.records import SPLITS

if TYPE_CHECKING:
    from typing import Any

    from sdn.data.files import Files

_CLAIM = f"{UNFINISHED}/claim.json"
_OURS = re.compile(rf"({'|'.join(SPLITS)})-(\d+)\.(tar|parquet)")


def claim(files: Files, made_from: dict[str, Any], parent: Manifest | None) -> None:
    """Take a place for a run, and clear it of what a run with other input has left.

    Args:
        files: the place; may hold finished versions, which are never touched.
        made_from: JSON values that the result depends on, among them `source`; where a run with
            the same was cut off, its finished parts and shards stay and are used again. None for
            `source` is the same as nothing.
        parent: the newest version there.

    Raises:
        ValueError: there are shards that no run of ours can have left.
    """
    text = json.dumps(made_from, sort_keys=True).encode()
    claimed = files.exists(_CLAIM)
    if claimed and made_from["source"] is not None and files.read(_CLAIM) == text:
        return
    left = next(iter(_strays(files, parent)), None)
    if left is not None and not claimed:
        raise ValueError(
            f"{files.uri} holds {left}, which no manifest names and no preparation that was cut "
            "off has left there; choose an empty place"
        )
    clear(files, parent)
    files.write(_CLAIM, text)


def undo(files: Files) -> tuple[Manifest, Manifest]:
    """Take the newest version away, with the shards that it added; the one before is newest again.

    Cut off in the middle, the next undo or append goes on with it.

    Returns:
        The version taken away, and the one that is the newest now.

    Raises:
        ValueError: no data set, or the first version of one.
    """
    newest = read_manifest(files)
    if newest.parent is None:
        raise ValueError(
            f"{files.uri} has one version only: delete the place itself to be rid of it"
        )
    before = read_manifest(files, newest.parent)
    files.write(_CLAIM, json.dumps({"undo": newest.digest}).encode())
    make_newest(files, before)
    files.remove(version_file(newest))
    files.remove(newest.dead_letter_file.name)
    clear(files, before)
    return newest, before


def clear(files: Files, newest: Manifest | None) -> None:
    """Remove everything unfinished, and shards that the newest version does not name."""
    for name in [*_strays(files, newest), *(info.name for info in files.walk(UNFINISHED))]:
        files.remove(name)


def _strays(files: Files, newest: Manifest | None) -> list[str]:
    """Files named like shards, with a number beyond those of the newest version."""
    counts = dict.fromkeys(SPLITS, 0)
    for segment in newest.segments if newest else ():
        counts[segment.split] += segment.shards
    found = []
    for info in files.walk():
        match = _OURS.fullmatch(info.name)
        if match is not None and int(match[2]) >= counts[match[1]]:
            found.append(info.name)
    return found

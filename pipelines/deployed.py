"""What a person has changed of a deployment on the server, so that deploying anew keeps it.

Prefect's own command deletes and makes anew schedules and triggers, and sets the limit of the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

RHYTHM = ("schedules", "concurrency_limit", "triggers")
"""Parts of an entry that belong to the server once they are deployed."""
_VARIABLE = re.compile(r"\{\{\s*\$(\w+)\s*\}\}")
_PARTS = 3


def resolved(value: Any, variables: Mapping[str, str]) -> Any:
    """A part of the file with each `{{ $NAME }}` replaced; unknown names are left to Prefect.

    Args:
        value: JSON values.
        variables: environment; `PWD` is the folder of the deployment.
    """
    if isinstance(value, dict):
        return {key: resolved(one, variables) for key, one in value.items()}
    if isinstance(value, list):
        return [resolved(one, variables) for one in value]
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: variables.get(found[1], found[0]), value)
    return value


def version_of(entry: dict[str, Any], code: str, variables: Mapping[str, str]) -> str:
    """WHAT-WHERE-WHEN: digests of the entry and the code; of what it becomes here; of its rhythm.

    Args:
        entry: of the file, for a pool.
        code: digest of all modules from which a form can come.
        variables: as `resolved`.
    """
    what = _digest([entry, code])[:12]
    where = _digest(resolved(entry, variables))[:8]
    return f"{what}-{where}-{_digest({part: entry.get(part) for part in RHYTHM})[:8]}"


def same_code(version: str | None, other: str) -> bool:
    """Whether two versions differ at most in the folder from which they were deployed."""
    mine, others = _parts(version), _parts(other)
    return (mine[0], mine[-1]) == (others[0], others[-1])


def as_left(
    entry: dict[str, Any], found: dict[str, Any], automations: list[dict[str, Any]]
) -> dict[str, Any]:
    """The entry with the schedules, the limit and the triggers' state that the server has.

    Where the file's own rhythm has changed since it was deployed, the file holds.

    Args:
        entry: to be deployed, with its version.
        found: the server's deployment of this name.
        automations: the server's, related to this deployment.
    """
    before = _parts(found["version"])
    if len(before) == _PARTS and before[-1] != _parts(entry["version"])[-1]:
        return entry
    kept = {key: value for key, value in entry.items() if key not in RHYTHM}
    kept["schedules"] = [_schedule(one) for one in found["schedules"]]
    limit = found["global_concurrency_limit"]
    if limit is not None:
        asked = entry.get("concurrency_limit") or {}
        how = asked if isinstance(asked, dict) else {}
        kept["concurrency_limit"] = {
            "collision_strategy": "ENQUEUE",
            **how,
            "limit": limit["limit"],
        }
    states = {one["name"]: one["enabled"] for one in automations}
    # One that is not there was removed by somebody.
    named = ((one, _name(entry, n, one)) for n, one in enumerate(entry.get("triggers", []), 1))
    kept["triggers"] = [one | {"enabled": states[name]} for one, name in named if name in states]
    return kept


def _name(entry: dict[str, Any], number: int, trigger: dict[str, Any]) -> str:
    """Of a trigger's automation; Prefect numbers those without."""
    return str(trigger.get("name") or f"{entry['name']}__automation_{number}")


def _schedule(one: dict[str, Any]) -> dict[str, Any]:
    """A schedule of the server as prefect.yaml writes it."""
    timing = {key: value for key, value in one["schedule"].items() if value is not None}
    about = {key: one[key] for key in ("parameters", "slug") if one.get(key)}
    return {**timing, **about, "active": one["active"]}


def _parts(version: str | None) -> list[str]:
    return (version or "").split("-")


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()

"""What lies in `infra/`, read as those read it who will run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
BASE = INFRA / "kubernetes" / "base"
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}")


def lines_of(path: Path) -> dict[str, str]:
    """NAME=value lines of a file of variables."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def interpolated(value: Any, given: dict[str, str]) -> Any:
    """Compose's `${NAME:-default}` and `${NAME:?text}` replaced, everywhere in a document.

    Raises:
        KeyError: a required variable is not given.
    """
    if isinstance(value, dict):
        return {key: interpolated(one, given) for key, one in value.items()}
    if isinstance(value, list):
        return [interpolated(one, given) for one in value]
    if not isinstance(value, str):
        return value

    def known(match: re.Match[str]) -> str:
        name, operator, text = match.groups()
        if operator == ":-":
            return given.get(name) or text
        return given[name]

    return _VARIABLE.sub(known, value)


def compose(given: dict[str, str]) -> dict[str, Any]:
    """compose.yaml, merged and interpolated."""
    document = yaml.safe_load((INFRA / "compose.yaml").read_text())
    return dict(interpolated(document, given))


def manifests() -> list[dict[str, Any]]:
    """Every document that the kustomization of the base names."""
    found = []
    for name in yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]:
        found += [one for one in yaml.safe_load_all((BASE / name).read_text()) if one]
    return found


def pod_templates(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> pod template of each group of pods that a document makes."""
    name, spec = document["metadata"]["name"], document.get("spec", {})
    if document["kind"] == "RayCluster":
        groups = {"head": spec["headGroupSpec"]}
        groups |= {group["groupName"]: group for group in spec["workerGroupSpecs"]}
        return {f"{name}/{group}": found["template"] for group, found in groups.items()}
    return {name: spec["template"]} if "template" in spec else {}


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    """All containers of a pod template, those that come first among them."""
    spec = template["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]

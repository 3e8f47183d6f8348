"""Tensors with the settings that they belong to, in one safetensors file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_SETTINGS = "sdn"
"""The one entry of the file's metadata: with several their order would differ between writings."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors and JSON settings; the same content gives the same bytes."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={_SETTINGS: json.dumps(settings, sort_keys=True)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote, on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or was written by something else; the text names it.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            settings = json.loads((file.metadata() or {})[_SETTINGS])
            return {name: file.get_tensor(name) for name in file.keys()}, settings  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, why: object) -> ValueError:
    """The error for a file whose content is not what its name promises."""
    return ValueError(
        f"{path} is not a whole model file ({why}): delete its folder and make it again, or fetch "
        "it again"
    )

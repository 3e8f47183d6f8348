"""`python -m pipelines.model_check MODEL_URI SAMPLES [PACKAGE]...`: does a model draw what it drew?

Run in a process of its own, in which nothing of the training is loaded. It needs MLflow and what
the model itself brings, of the packages that are named; whatever only training needs cannot be
imported here.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

SAMPLES = "samples.json"
"""Lists the samples of an evaluation: caption, seed, and the PNG file beside it."""
FORBIDDEN = ("ray", "prefect", "webdataset", "pyarrow", "sklearn", "optuna", "boto3")


class Absent(MetaPathFinder):
    """Packages that are not there for this process, installed or not."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As in `importlib`."""
        del path, target
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{fullname} is absent here", name=fullname)
        return None


def forbidden(packages: Sequence[str]) -> tuple[str, ...]:
    """Of `FORBIDDEN` what these packages of a model do not need themselves."""
    needed, left = set(), [*packages]
    while left:
        name = canonicalize_name(left.pop())
        if name in needed:
            continue
        needed.add(name)
        with suppress(PackageNotFoundError):
            wanted = map(Requirement, requires(name) or ())
            left += [w.name for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})]
    owners = packages_distributions()
    return tuple(
        name for name in FORBIDDEN if not needed & set(map(canonicalize_name, owners.get(name, ())))
    )


def check(uri: str, samples: Path, absent: Sequence[str] = FORBIDDEN) -> dict[str, Any]:
    """Draw the samples again, each alone and all of a seed together.

    Args:
        uri: of the logged model.
        samples: see `pipelines.registry.register`.
        absent: what must not be loaded for it.

    Returns:
        `samples` (how many), `different` (what differs, one text each), `code` (where the model's
        own code was loaded from), `loaded` (forbidden packages that were loaded), `sha256` of the
        model's folder as it came.

    Raises:
        FileNotFoundError, ValueError: there are no samples.
        Exception: what loading the model raises.
    """
    import mlflow

    from pipelines.digests import folder_digest

    listed = json.loads((samples / SAMPLES).read_text())["samples"]
    if not listed:
        raise ValueError(f"{samples / SAMPLES} lists no samples")
    place = Path(mlflow.artifacts.download_artifacts(uri))
    model = mlflow.pyfunc.load_model(str(place))
    different = []
    for seed in sorted({one["seed"] for one in listed}):
        group = [one for one in listed if one["seed"] == seed]
        together = model.predict([one["caption"] for one in group], params={"seed": seed})
        for one, beside in zip(group, together, strict=True):
            wanted = (samples / one["file"]).read_bytes()
            (alone,) = model.predict([one["caption"]], params={"seed": seed})
            different += [
                f"{one['file']} ({one['caption']!r}, seed {seed}, drawn {how}): "
                f"{_first(wanted, came)}"
                for how, came in (("alone", alone), ("with others", beside))
                if came != wanted
            ]
    return {
        "samples": len(listed),
        "different": different,
        "code": str(Path(sys.modules["sdn"].__file__ or "").parent.relative_to(place.resolve())),
        "loaded": [name for name in absent if name in sys.modules],
        "sha256": folder_digest(model_folder_in(place)),
    }


def model_folder_in(place: Path) -> Path:
    """The model folder among the files of a logged model.

    Raises:
        ValueError: there is not exactly one.
    """
    folders = [path for path in (place / "artifacts").glob("*") if path.is_dir()]
    if len(folders) != 1:
        raise ValueError(f"{place} holds {len(folders)} model folders in artifacts, expected one")
    return folders[0]


def _first(wanted: bytes, came: bytes) -> str:
    """What differs between two PNG files."""
    import io

    import numpy as np
    from PIL import Image

    try:
        one, other = (
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
            for data in (wanted, came)
        )
    except OSError as error:
        return f"not readable: {error}"
    if one.shape != other.shape:
        return f"{one.shape[1]}x{one.shape[0]} pixels, now {other.shape[1]}x{other.shape[0]}"
    apart = abs(one - other)
    if not apart.any():
        return "equal pixels, other bytes of the file"
    return f"{np.count_nonzero(apart.max(2))} pixels differ, by up to {apart.max()}"


def main() -> None:
    """Print what was found as one line of JSON, the last."""
    uri, samples, *packages = sys.argv[1:]
    absent = forbidden(packages)
    sys.meta_path.insert(0, Absent(absent))
    print(json.dumps(check(uri, Path(samples), absent)))


if __name__ == "__main__":
    main()

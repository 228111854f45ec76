"""Networks by name, from [0, 1] pixels to logits with the normalisation inside, and built from a seed.

Weights of the residual networks are named as in DeepMind's code (`DMWideResNet` and `DMPreActResNet` in RobustBench),
so that its files load as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import index
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from puma.errors import UsageError, unknown

Padding = Literal["same", "symmetric"]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)
NAMES = ("small-cnn", "wrn-D-K", "preactresnet-18", "preactresnet-34")

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

    The same name, options and seed give the same weights; the global generators are not touched. ``model.config`` is a
    JSON value with everything needed to build it again. `UsageError` for a name, option or size that it cannot have.

    Args:
        name: ``"small-cnn"``, ``"wrn-D-K"`` (as ``"wrn-28-10"``), ``"preactresnet-18"`` or ``"preactresnet-34"``.
        num_classes: at least 2.
        in_channels: image channels.
        image_size: height and width in pixels.
        mean: of each channel, for the normalisation inside, in pixel units; default CIFAR-10's for three, else 0.5.
        std: standard deviation of each channel, likewise.
        seed: of the weights.
        **options: ``activation="relu"|"silu"``; ``padding="same"|"symmetric"`` of the residual networks;
            ``norm="none"|"batch"|"group"`` and ``widths`` of ``small-cnn``.
    """
    num_classes, in_channels, image_size, seed = map(index, (num_classes, in_channels, image_size, seed))
    found = re.fullmatch(r"(small-cnn)|(wrn)-(\d+)-(\d+)|(preactresnet)-(18|34)", name)
    if not found:
        raise unknown("model", name, [*NAMES, "wrn-28-10", "wrn-34-10"])
    known = {"activation", "norm", "widths"} if found[1] else {"activation", "padding"}
    for option in options.keys() - known:
        raise unknown(f"option of {name}", option, known)
    if num_classes < 2:
        raise UsageError(f"num_classes {num_classes} is not a classification", fix="at least two classes")
    if not 8 <= image_size <= (35 if found[1] else 4096) or not 1 <= in_channels <= 1024:
        what, fix = f"{in_channels} x {image_size} x {image_size}", "8 pixels or more (small-cnn: up to 35)"
        raise UsageError(f"{name} does not take {what} images", fix=fix)
    mean = mean if mean is not None else CIFAR10_MEAN if in_channels == 3 else (0.5,) * in_channels
    std = std if std is not None else CIFAR10_STD if in_channels == 3 else (0.5,) * in_channels
    if len(mean) != in_channels:
        raise UsageError(f"mean {list(mean)} has not one value for each of {in_channels} channels")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        normalise = Normalise(mean, std)
        style = Style(options.get("activation", "silu"), options.get("padding", "same"))
        if style.padding not in get_args(Padding):
            raise unknown("padding", style.padding, get_args(Padding))
        model: nn.Module
        if found[1]:
            norm, widths = options.get("norm", "none"), options.get("widths", (16, 32, 32))
            model = SmallCNN(normalise, num_classes, in_channels, image_size, style, norm, widths)
        elif found[2]:
            model = WideResNet(normalise, num_classes, in_channels, int(found[3]), int(found[4]), style)
        else:
            model = PreActResNet(normalise, num_classes, in_channels, int(found[6]), style)
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    config = {"name": name, **sizes, "mean": list(mean), "std": list(std), **options}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    object.__setattr__(model, "config", plain)  # nn.Module declares its attributes as tensors and modules only
    return model


class Style(NamedTuple):
    """What the layers of a network have in common."""

    activation: str
    padding: Padding

    def activate(self) -> nn.Module:
        """A layer of the activation."""
        if self.activation not in _ACTIVATIONS:
            raise unknown("activation", self.activation, _ACTIVATIONS)
        return _ACTIVATIONS[self.activation]()


class Normalise(nn.Module):
    """Shift and scale [0, 1] pixels per channel: ``(x - mean) / std``.

    Mean and std, in pixel units, belong to the configuration, not to the weights: they are not in the state dict.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0.0) <= 0:
            what = f"mean {list(mean)} and std {list(std)} do not normalise"
            raise UsageError(what, fix="one positive std a channel")
        values = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.mean, self.std = (nn.Buffer(value, persistent=False) for value in values)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]``."""
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        if images.shape[1] > 1 and images.is_contiguous(memory_format=torch.channels_last):
            # a few numbers repeated along the innermost axis keep a CPU from using its vector units: six times slower
            one_image = (1, *images.shape[1:])
            mean, std = (v.expand(one_image).contiguous(memory_format=torch.channels_last) for v in (mean, std))
        return (images - mean) / std


class SameConv(nn.Conv2d):
    """A 3x3 convolution that pads like TensorFlow's SAME: at stride 2 only right and bottom (DeepMind's networks)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, padding: Padding = "same") -> None:
        self.pad = (0, 1, 0, 1) if stride == 2 and padding == "same" else None
        super().__init__(in_channels, out_channels, 3, stride, padding=0 if self.pad else 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve ``[B, C, H, W]``."""
        return super().forward(nn.functional.pad(images, self.pad) if self.pad else images)


def _norm_layer(kind: str, channels: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "group":
        return [nn.GroupNorm(next(g for g in range(min(8, channels), 0, -1) if channels % g == 0), channels)]
    if kind == "none":
        return []
    raise unknown("normalisation layer", kind, ["batch", "group", "none"])


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with strides that end at a map of 4x4, and a linear layer; trains in seconds on a core."""

    def __init__(
        self,
        normalise: Normalise,
        classes: int,
        channels: int,
        size: int,
        style: Style,
        norm: str,
        widths: Sequence[int],
    ) -> None:
        super().__init__()
        strides = (1, 2, 1) if size < 12 else (1, 2, 2) if size < 20 else (2, 2, 2)
        self.normalise = normalise
        layers: list[nn.Module] = []
        for width, stride in zip(widths, strides, strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1), *_norm_layer(norm, width)]
            layers.append(style.activate())
            size, channels = (size + stride - 1) // stride, width
        self.features = nn.Sequential(*layers)
        self.logits = nn.Linear(channels * size * size, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1]."""
        return cast(Tensor, self.logits(self.features(self.normalise(images)).flatten(1)))


class _WideBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, style: Style) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inner)
        self.conv_0 = SameConv(inner, outer, stride, style.padding)
        self.batchnorm_1 = nn.BatchNorm2d(outer)
        self.conv_1 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None
        self.activation = style.activate()

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.batchnorm_0(x))
        skip = x if self.shortcut is None else self.shortcut(out)  # the shortcut reads the activated input
        out = self.conv_1(self.activation(self.batchnorm_1(self.conv_0(out))))
        return cast(Tensor, skip + out)


class WideResNet(nn.Module):
    """WRN-depth-width (arXiv 1605.07146) in the pre-activation form of robust training (arXiv 2010.03593, section 4).

    Depth is 6n + 4, channels are 16, 16w, 32w, 64w. Padding at stride 2: "same" pads right and bottom (DeepMind, Wang
    et al. 2023), "symmetric" all sides (TRADES, RobustBench's `WideResNet`). The same weights give different logits.
    """

    def __init__(self, normalise: Normalise, classes: int, channels: int, depth: int, width: int, style: Style) -> None:
        super().__init__()
        if not 10 <= depth <= 1000 or (depth - 4) % 6 or not 1 <= width <= 1000:
            raise UsageError(f"there is no WRN-{depth}-{width}", why="the depth has to be 6n + 4: 10, 16, 28, 34, 70")
        blocks, widths = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.normalise = normalise
        self.init_conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential()
        for group, outer in enumerate(widths[1:]):
            inner, stride = widths[group], 2 if group else 1
            first = _WideBlock(inner, outer, stride, style)
            others = [_WideBlock(outer, outer, 1, style) for _ in range(1, blocks)]
            self.layer.append(nn.Sequential())
            self.layer[-1].add_module("block", nn.Sequential(first, *others))
        self.batchnorm = nn.BatchNorm2d(widths[3])
        self.activation = style.activate()
        self.logits = nn.Linear(widths[3], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1]."""
        out = self.layer(self.init_conv(self.normalise(images)))
        return cast(Tensor, self.logits(self.activation(self.batchnorm(out)).mean((2, 3))))


class _PreActBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, style: Style) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inner)
        self.conv_2d_1 = SameConv(inner, outer, stride, style.padding)
        self.batchnorm_1 = nn.BatchNorm2d(outer)
        self.conv_2d_2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        # 3x3 and on the raw input: a peculiarity of this family, kept so that its weights load
        self.shortcut = SameConv(inner, outer, stride, style.padding) if stride != 1 or inner != outer else None
        self.activation = style.activate()

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x)
        out = self.conv_2d_1(self.activation(self.batchnorm_0(x)))
        out = self.conv_2d_2(self.activation(self.batchnorm_1(out)))
        return cast(Tensor, skip + out)


class PreActResNet(nn.Module):
    """PreActResNet-18 or -34 (arXiv 1603.05027) with 64 to 512 channels, as robust training uses them."""

    def __init__(self, normalise: Normalise, classes: int, channels: int, depth: int, style: Style) -> None:
        super().__init__()
        self.normalise = normalise
        self.conv_2d = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        inner = 64
        for i, blocks in enumerate(_PREACT_BLOCKS[depth]):
            outer, stride = 64 * 2**i, 2 if i else 1
            first = _PreActBlock(inner, outer, stride, style)
            others = [_PreActBlock(outer, outer, 1, style) for _ in range(blocks - 1)]
            self.add_module(f"layer_{i}", nn.Sequential(first, *others))
            inner = outer
        self.batchnorm = nn.BatchNorm2d(512)
        self.activation = style.activate()
        self.logits = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1]."""
        out = self.conv_2d(self.normalise(images))
        for i in range(4):
            out = self.get_submodule(f"layer_{i}")(out)
        return cast(Tensor, self.logits(self.activation(self.batchnorm(out)).mean((2, 3))))

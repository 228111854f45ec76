"""Networks by name, from [0, 1] pixels to logits with the normalisation inside, and built from a seed.

Weights of the residual networks have the names of DeepMind's code (RobustBench's `DMWideResNet`, `DMPreActResNet`).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from math import gcd
from operator import index
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from puma.errors import UsageError, unknown

_NAMES = ("small-cnn", "wrn-28-10", "wrn-34-10", "wrn-D-K", "preactresnet-18", "preactresnet-34")
_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}  # SiLU: Swish in DeepMind's code
_CHOICES = {"activation": [*_ACTIVATIONS], "norm": ["none", "batch", "group"]}
NAMED = re.compile(r"(small-cnn)|(wrn)-(\d+)-(\d+)|(preactresnet)-(18|34)")
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
        mean, std: of each channel, for the normalisation inside, in pixel units; CIFAR-10's for three, else 0.5.
        seed: of the weights.
        **options: ``activation="relu"|"silu"``; ``norm="none"|"batch"|"group"`` and ``widths`` of ``small-cnn``.
    """
    num_classes, in_channels, image_size, seed = map(index, (num_classes, in_channels, image_size, seed))
    found = NAMED.fullmatch(name)
    if not found:
        raise unknown("model", name, _NAMES)
    known = {"activation", "norm", "widths"} if found[1] else {"activation"}
    for option in options.keys() - known:
        raise unknown(f"option of {name}", option, known)
    style = Style()._replace(**options)
    for option, values in _CHOICES.items():
        if getattr(style, option) not in values:
            raise unknown(option, getattr(style, option), values)
    if num_classes < 2:
        raise UsageError(f"num_classes {num_classes} is not a classification", fix="at least two classes")
    if not 8 <= image_size <= (35 if found[1] else 4096) or not 1 <= in_channels <= 1024:
        what, fix = f"{in_channels} x {image_size} x {image_size}", "8 pixels or more (small-cnn: up to 35)"
        raise UsageError(f"{name} does not take {what} images", fix=fix)
    usual = _CIFAR10 if in_channels == 3 else ((0.5,) * in_channels,) * 2
    mean, std = usual[0] if mean is None else mean, usual[1] if std is None else std
    if len(mean) != in_channels:
        raise UsageError(f"mean {list(mean)} has not one value for each of {in_channels} channels")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        normalise = Normalise(mean, std)
        model: nn.Module
        if found[1]:
            model = SmallCNN(normalise, num_classes, in_channels, image_size, style)
        elif found[2]:
            model = WideResNet(normalise, num_classes, in_channels, int(found[3]), int(found[4]), style)
        else:
            model = PreActResNet(normalise, num_classes, in_channels, int(found[6]), style)
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    config = {"name": name, **sizes, "mean": list(mean), "std": list(std), **options}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    object.__setattr__(model, "config", plain)  # nn.Module declares its attributes as tensors and modules only
    return model


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """What `build_model` takes to build ``model`` again; None for other networks, whose ``config`` is their own."""
    ours = isinstance(getattr(model, "_orig_mod", model), (SmallCNN, WideResNet, PreActResNet))  # torch.compile's
    return cast("dict[str, Any] | None", getattr(model, "config", None)) if ours else None


class Style(NamedTuple):
    """What the layers of a network have in common; ``norm`` and ``widths`` are those of `SmallCNN`."""

    activation: str = "silu"
    norm: str = "none"
    widths: Sequence[int] = (16, 32, 32)

    def activate(self) -> nn.Module:
        """A layer of the activation."""
        return _ACTIVATIONS[self.activation]()


class Normalise(nn.Module):
    """``(x - mean) / std`` of each channel, in pixel units; they belong to the configuration, not to the state dict."""

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

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        self.pad = (0, 1, 0, 1) if stride == 2 else None
        super().__init__(in_channels, out_channels, 3, stride, padding=0 if self.pad else 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve ``[B, C, H, W]``."""
        return super().forward(nn.functional.pad(images, self.pad) if self.pad else images)


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with strides that end at a map of 4x4, and a linear layer; trains in seconds on a core."""

    def __init__(self, normalise: Normalise, classes: int, channels: int, size: int, style: Style) -> None:
        super().__init__()
        strides = (1, 2, 1) if size < 12 else (1, 2, 2) if size < 20 else (2, 2, 2)
        self.normalise = normalise
        layers: list[nn.Module] = []
        for width, stride in zip(style.widths, strides, strict=True):
            layers.append(nn.Conv2d(channels, width, 3, stride, padding=1))
            if style.norm != "none":
                layers.append(nn.BatchNorm2d(width) if style.norm == "batch" else nn.GroupNorm(gcd(8, width), width))
            layers.append(style.activate())
            size, channels = (size + stride - 1) // stride, width
        self.features = nn.Sequential(*layers)
        self.logits = nn.Linear(channels * size * size, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1]."""
        return cast(Tensor, self.logits(self.features(self.normalise(images)).flatten(1)))


class _Block(nn.Module):
    """A pre-activation block of either family of residual networks."""

    def __init__(self, inner: int, outer: int, stride: int, style: Style, *, wide: bool) -> None:
        super().__init__()
        self.wide, self.names = wide, ("conv_0", "conv_1") if wide else ("conv_2d_1", "conv_2d_2")
        self.batchnorm_0 = nn.BatchNorm2d(inner)
        self.add_module(self.names[0], SameConv(inner, outer, stride))
        self.batchnorm_1 = nn.BatchNorm2d(outer)
        self.add_module(self.names[1], nn.Conv2d(outer, outer, 3, padding=1, bias=False))
        self.shortcut: nn.Module | None = None
        if inner != outer and wide:
            self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False)
        elif inner != outer:
            self.shortcut = SameConv(inner, outer, stride)
        self.activation = style.activate()

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.batchnorm_0(x))
        # PreActResNet's shortcut is 3x3 and on the raw input: kept so that its weights load
        skip = x if self.shortcut is None else self.shortcut(out if self.wide else x)
        out = self.activation(self.batchnorm_1(self.get_submodule(self.names[0])(out)))
        return cast(Tensor, skip + self.get_submodule(self.names[1])(out))


def _blocks(count: int, inner: int, outer: int, stride: int, style: Style, *, wide: bool) -> nn.Sequential:
    first = _Block(inner, outer, stride, style, wide=wide)
    return nn.Sequential(first, *(_Block(outer, outer, 1, style, wide=wide) for _ in range(1, count)))


class WideResNet(nn.Module):
    """WRN-depth-width (arXiv 1605.07146) in the pre-activation form of robust training (arXiv 2010.03593, section 4).

    Depth is 6n + 4, channels are 16, 16w, 32w, 64w.
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
            self.layer.append(nn.Sequential(OrderedDict(block=_blocks(blocks, inner, outer, stride, style, wide=True))))
        self.batchnorm = nn.BatchNorm2d(widths[3])
        self.activation = style.activate()
        self.logits = nn.Linear(widths[3], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1]."""
        out = self.layer(self.init_conv(self.normalise(images)))
        return cast(Tensor, self.logits(self.activation(self.batchnorm(out)).mean((2, 3))))


class PreActResNet(nn.Module):
    """PreActResNet-18 or -34 (arXiv 1603.05027) with 64 to 512 channels, as robust training uses them."""

    def __init__(self, normalise: Normalise, classes: int, channels: int, depth: int, style: Style) -> None:
        super().__init__()
        self.normalise = normalise
        self.conv_2d = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        inner = 64
        for i, blocks in enumerate(_PREACT_BLOCKS[depth]):
            outer, stride = 64 * 2**i, 2 if i else 1
            self.add_module(f"layer_{i}", _blocks(blocks, inner, outer, stride, style, wide=False))
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

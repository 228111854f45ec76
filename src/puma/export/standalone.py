"""A network and its weights, needing nothing but torch: float images [B, C, H, W] in [0, 1] in, logits [B, K] out.

Written by PUMA (arXiv 2405.06298) beside the weights of a model::

    from model import load

    model = load()  # in eval mode, on the CPU; the normalisation is inside
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


class Conv3x3(nn.Conv2d):
    """3x3 without bias; at stride 2 ``"same"`` pads right and bottom only, as TensorFlow does."""

    def __init__(self, inner: int, outer: int, stride: int = 1, padding: str = "symmetric") -> None:
        self.manual = stride == 2 and padding == "same"
        super().__init__(inner, outer, 3, stride, padding=0 if self.manual else 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.manual else x)


class Normalised(nn.Module):
    """Normalises [0, 1] pixels; mean and std are no part of the state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalised(self, x: Tensor) -> Tensor:
        """(x - mean) / std."""
        return (x - self.mean) / self.std


class WideBlock(nn.Module):
    """Pre-activation block; the shortcut reads the activated input."""

    def __init__(self, inner: int, outer: int, stride: int, activation: str, padding: str) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inner)
        self.conv_0 = Conv3x3(inner, outer, stride, padding)
        self.batchnorm_1 = nn.BatchNorm2d(outer)
        self.conv_1 = Conv3x3(outer, outer)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's change to its input."""
        out = self.activation(self.batchnorm_0(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        changed: Tensor = self.conv_1(self.activation(self.batchnorm_1(self.conv_0(out))))
        return skip + changed


class WideGroup(nn.Module):
    """A stage of blocks."""

    def __init__(self, blocks: int, inner: int, outer: int, stride: int, activation: str, padding: str) -> None:
        super().__init__()
        shapes = [(inner, outer, stride)] + [(outer, outer, 1)] * (blocks - 1)
        self.block = nn.Sequential(*(WideBlock(*shape, activation, padding) for shape in shapes))

    def forward(self, x: Tensor) -> Tensor:
        """One block after the other."""
        out: Tensor = self.block(x)
        return out


class WideResNet(Normalised):
    """WRN-depth-width with the weight names of RobustBench's ``DMWideResNet``."""

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        in_channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        activation: str = "silu",
        padding: str = "same",
    ) -> None:
        super().__init__(mean, std)
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.init_conv = Conv3x3(in_channels, 16)
        stages = zip(channels, channels[1:], (1, 2, 2), strict=False)
        self.layer = nn.Sequential(*(WideGroup((depth - 4) // 6, *stage, activation, padding) for stage in stages))
        self.batchnorm = nn.BatchNorm2d(channels[3])
        self.activation = ACTIVATIONS[activation]()
        self.logits = nn.Linear(channels[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        out = self.activation(self.batchnorm(self.layer(self.init_conv(self.normalised(x)))))
        logits: Tensor = self.logits(out.mean((2, 3)))
        return logits


class PlainWideBlock(nn.Module):
    """`WideBlock` with the weight names of RobustBench's ``WideResNet``."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv1 = Conv3x3(inner, outer, stride)
        self.bn2 = nn.BatchNorm2d(outer)
        self.conv2 = Conv3x3(outer, outer)
        self.convShortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's change to its input."""
        out = F.relu(self.bn1(x))
        skip = x if self.convShortcut is None else self.convShortcut(out)
        changed: Tensor = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return skip + changed


class PlainWideGroup(nn.Module):
    """A stage of plain blocks."""

    def __init__(self, blocks: int, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        shapes = [(inner, outer, stride)] + [(outer, outer, 1)] * (blocks - 1)
        self.layer = nn.Sequential(*(PlainWideBlock(*shape) for shape in shapes))

    def forward(self, x: Tensor) -> Tensor:
        """One block after the other."""
        out: Tensor = self.layer(x)
        return out


class PlainWideResNet(nn.Module):
    """WRN-depth-width without normalisation, with the weight names of RobustBench's ``WideResNet``."""

    def __init__(self, depth: int, widen_factor: int, num_classes: int) -> None:
        super().__init__()
        blocks, width = (depth - 4) // 6, widen_factor
        self.conv1 = Conv3x3(3, 16)
        self.block1 = PlainWideGroup(blocks, 16, 16 * width, 1)
        self.block2 = PlainWideGroup(blocks, 16 * width, 32 * width, 2)
        self.block3 = PlainWideGroup(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        out = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        logits: Tensor = self.fc(out.mean((2, 3)))
        return logits


class PreActBlock(nn.Module):
    """Pre-activation block whose shortcut is 3x3 and reads the raw input."""

    def __init__(self, inner: int, outer: int, stride: int, activation: str, padding: str) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inner)
        self.conv_2d_1 = Conv3x3(inner, outer, stride, padding)
        self.batchnorm_1 = nn.BatchNorm2d(outer)
        self.conv_2d_2 = Conv3x3(outer, outer)
        self.shortcut = Conv3x3(inner, outer, stride, padding) if stride != 1 or inner != outer else None
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's change to its input."""
        skip = x if self.shortcut is None else self.shortcut(x)
        out = self.conv_2d_1(self.activation(self.batchnorm_0(x)))
        changed: Tensor = self.conv_2d_2(self.activation(self.batchnorm_1(out)))
        return skip + changed


class PreActResNet(Normalised):
    """PreActResNet-18 or -34 with the weight names of RobustBench's ``DMPreActResNet``."""

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        activation: str = "silu",
        padding: str = "same",
    ) -> None:
        super().__init__(mean, std)
        self.conv_2d = Conv3x3(in_channels, 64)
        inner = 64
        for i, blocks in enumerate({18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}[depth]):
            outer = 64 << i
            shapes = [(inner, outer, 2 if i else 1)] + [(outer, outer, 1)] * (blocks - 1)
            stage = nn.Sequential(*(PreActBlock(*shape, activation, padding) for shape in shapes))
            self.add_module(f"layer_{i}", stage)
            inner = outer
        self.batchnorm = nn.BatchNorm2d(512)
        self.activation = ACTIVATIONS[activation]()
        self.logits = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        out = self.conv_2d(self.normalised(x))
        for i in range(4):
            out = self.get_submodule(f"layer_{i}")(out)
        logits: Tensor = self.logits(self.activation(self.batchnorm(out)).mean((2, 3)))
        return logits


class SmallCNN(Normalised):
    """Three 3x3 convolutions and a linear layer."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        activation: str = "silu",
        norm: str = "none",
        widths: Sequence[int] = (16, 32, 32),
    ) -> None:
        super().__init__(mean, std)
        strides = (1, 2, 1) if image_size < 12 else (1, 2, 2) if image_size < 20 else (2, 2, 2)
        layers: list[nn.Module] = []
        size, inner = image_size, in_channels
        for outer, stride in zip(widths, strides, strict=True):
            layers.append(nn.Conv2d(inner, outer, 3, stride, padding=1))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(outer))
            elif norm == "group":
                groups = next(g for g in range(min(8, outer), 0, -1) if outer % g == 0)
                layers.append(nn.GroupNorm(groups, outer))
            layers.append(ACTIVATIONS[activation]())
            size, inner = (size + stride - 1) // stride, outer
        self.features = nn.Sequential(*layers)
        self.logits = nn.Linear(inner * size * size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        logits: Tensor = self.logits(self.features(self.normalised(x)).flatten(1))
        return logits


NETWORKS: dict[str, type[nn.Module]] = {
    network.__name__: network for network in (WideResNet, PlainWideResNet, PreActResNet, SmallCNN)
}


def build(config: dict[str, Any]) -> nn.Module:
    """The network that ``config.json`` describes, with fresh weights."""
    arguments = {name: value for name, value in config.items() if name not in ("architecture", "puma")}
    return NETWORKS[config["architecture"]](**arguments)


def load(folder: str | Path = Path(__file__).parent) -> nn.Module:
    """The model whose ``config.json`` and weights lie in ``folder`` (by default beside this file), in eval mode."""
    folder = Path(folder)
    model = build(json.loads((folder / "config.json").read_text()))
    if (folder / "model.safetensors").is_file():
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
    else:
        (path,) = folder.glob("*.pt")
        weights = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(weights, strict=True)
    return model.eval()

"""What the networks share: normalisation inside, activations, normalisation layers, padding at stride 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from puma.errors import UsageError, unknown

Activation = Literal["relu", "silu"]
NormLayer = Literal["batch", "group", "none"]
Padding = Literal["same", "symmetric"]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class Normalise(nn.Module):
    """Shift and scale [0, 1] pixels per channel: ``(x - mean) / std``.

    Mean and std belong to the configuration, not to the weights: they are not in the state dict.

    Args:
        mean: one number per channel, in pixel units.
        std: one positive number per channel, in pixel units.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0.0) <= 0:
            raise UsageError(
                f"mean {list(mean)} and std {list(std)} do not normalise", fix="one positive std a channel"
            )
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise ``[B, C, H, W]``."""
        mean, std = self.mean, self.std
        if images.shape[1] > 1 and images.is_contiguous(memory_format=torch.channels_last):
            # a few numbers repeated along the innermost axis keep a CPU from using its vector units: six times slower
            mean, std = (_spread(value, images.shape) for value in (mean, std))
        return (images - mean) / std


def _spread(values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One image of ``[1, C, 1, 1]`` values, in the memory format channels_last."""
    return values.expand(1, *shape[1:]).contiguous(memory_format=torch.channels_last)


def activation_layer(name: str) -> nn.Module:
    """A fresh activation module: ``relu`` or ``silu`` (SiLU, called Swish in DeepMind's code)."""
    if name not in _ACTIVATIONS:
        raise unknown("activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]()


def norm_layer(kind: str, channels: int) -> nn.Module:
    """A normalisation layer over ``channels``: ``batch``, ``group`` (up to 8 groups) or ``none``."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(next(g for g in range(min(8, channels), 0, -1) if channels % g == 0), channels)
    if kind == "none":
        return nn.Identity()
    raise unknown("normalisation layer", kind, ["batch", "group", "none"])


class SameConv(nn.Conv2d):
    """A 3x3 convolution that pads like TensorFlow's SAME: at stride 2 only right and bottom (DeepMind's networks).

    The weight's name and shape are those of an ordinary convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, padding: Padding = "same") -> None:
        self.pad = (0, 1, 0, 1) if stride == 2 and padding == "same" else None
        super().__init__(in_channels, out_channels, 3, stride, padding=0 if self.pad else 1, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Convolve ``[B, C, H, W]``."""
        return super().forward(nn.functional.pad(images, self.pad) if self.pad else images)

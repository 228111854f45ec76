"""PreActResNet-18 and -34 (arXiv 1603.05027) as robust training uses them (`DMPreActResNet` in RobustBench)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from puma.errors import UsageError
from puma.models.layers import Normalise, Padding, SameConv, activation_layer

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, activation: str, padding: Padding) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inner)
        self.conv_2d_1 = SameConv(inner, outer, stride, padding)
        self.batchnorm_1 = nn.BatchNorm2d(outer)
        self.conv_2d_2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        # 3x3 and on the raw input: a peculiarity of this family, kept so that its weights load
        self.shortcut = SameConv(inner, outer, stride, padding) if stride != 1 or inner != outer else None
        self.activation = activation_layer(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = x if self.shortcut is None else self.shortcut(x)
        out = self.conv_2d_1(self.activation(self.batchnorm_0(x)))
        out = self.conv_2d_2(self.activation(self.batchnorm_1(out)))
        return cast(torch.Tensor, skip + out)


class PreActResNet(nn.Module):
    """PreActResNet with 64 to 512 channels; depth 18 on CIFAR-10 has 12,548,426 parameters.

    Args:
        depth: 18 or 34.
        num_classes: number of logits.
        in_channels: image channels.
        activation: ``"silu"`` or ``"relu"``.
        padding: at stride 2, ``"same"`` (right and bottom) or ``"symmetric"``.
        mean: channel means in pixel units.
        std: channel standard deviations in pixel units.
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
        if depth not in _BLOCKS:
            raise UsageError(f"there is no PreActResNet-{depth}", fix="use 18 or 34")
        self.normalise = Normalise(mean, std)
        self.conv_2d = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        for i, blocks in enumerate(_BLOCKS[depth]):
            inner, outer, stride = 64 * 2 ** max(i - 1, 0), 64 * 2**i, 2 if i else 1
            layers = [
                _Block(outer if b else inner, outer, 1 if b else stride, activation, padding) for b in range(blocks)
            ]
            self.add_module(f"layer_{i}", nn.Sequential(*layers))
        self.batchnorm = nn.BatchNorm2d(512)
        self.activation = activation_layer(activation)
        self.logits = nn.Linear(512, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1]."""
        out = self.conv_2d(self.normalise(images))
        for i in range(4):
            out = self.get_submodule(f"layer_{i}")(out)
        logits: torch.Tensor = self.logits(self.activation(self.batchnorm(out)).mean((2, 3)))
        return logits

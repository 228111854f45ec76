"""WideResNet (arXiv 1605.07146) in the pre-activation form of robust training (arXiv 2010.03593, section 4).

Weights are named as in DeepMind's code (`DMWideResNet` in RobustBench), so that its files load as they are;
`puma.models.robustbench` renames them for RobustBench's `WideResNet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from puma.errors import UsageError
from puma.models.layers import Normalise, Padding, SameConv, activation_layer


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, activation: str, padding: Padding) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inner)
        self.conv_0 = SameConv(inner, outer, stride, padding)
        self.batchnorm_1 = nn.BatchNorm2d(outer)
        self.conv_1 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None
        self.activation = activation_layer(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.activation(self.batchnorm_0(x))
        skip = x if self.shortcut is None else self.shortcut(out)  # the shortcut reads the activated input
        out = self.conv_1(self.activation(self.batchnorm_1(self.conv_0(out))))
        return cast(torch.Tensor, skip + out)


class _Group(nn.Module):
    def __init__(self, blocks: int, inner: int, outer: int, stride: int, activation: str, padding: Padding) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(_Block(outer if i else inner, outer, 1 if i else stride, activation, padding) for i in range(blocks))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block(x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-width; WRN-28-10 on CIFAR-10 has 36,479,194 parameters.

    Args:
        depth: 6n + 4: 10, 16, 22, 28, 34, 40, 70, ...
        width: channels are 16, 16w, 32w, 64w.
        num_classes: number of logits.
        in_channels: image channels.
        activation: ``"silu"`` (as in the synthetic-data recipes) or ``"relu"``.
        padding: at stride 2, ``"same"`` pads right and bottom (DeepMind, Wang et al. 2023), ``"symmetric"`` all sides
            (TRADES, RobustBench's `WideResNet`). The same weights give different logits.
        mean: channel means in pixel units.
        std: channel standard deviations in pixel units.
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
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise UsageError(f"there is no WRN-{depth}-{width}", why="the depth has to be 6n + 4: 10, 16, 28, 34, 70")
        blocks, channels = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.normalise = Normalise(mean, std)
        self.init_conv = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            *(_Group(blocks, channels[i], channels[i + 1], 2 if i else 1, activation, padding) for i in range(3))
        )
        self.batchnorm = nn.BatchNorm2d(channels[3])
        self.activation = activation_layer(activation)
        self.logits = nn.Linear(channels[3], num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1]."""
        out = self.layer(self.init_conv(self.normalise(images)))
        out = self.activation(self.batchnorm(out)).mean((2, 3))
        logits: torch.Tensor = self.logits(out)
        return logits

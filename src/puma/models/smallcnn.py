"""A network for 8 to 32 pixels that trains adversarially in seconds on one core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from puma.models.layers import Normalise, activation_layer, norm_layer


class SmallCNN(nn.Module):
    """Three 3x3 convolutions (16, 32, 32 channels by default), then a linear layer on their 4x4 map.

    Strides are chosen so that the map ends at 4 pixels (8 pixels: 1, 2, 1; 16: 1, 2, 2; 28 and 32: 2, 2, 2). With one
    8x8 channel and ten classes it has 19,178 parameters.

    Args:
        num_classes: number of logits.
        in_channels: image channels.
        image_size: height and width in pixels, 8 to 35.
        activation: ``"silu"`` or ``"relu"``.
        norm: ``"none"``, ``"batch"`` or ``"group"`` after each convolution.
        widths: channels of the three convolutions.
        mean: channel means in pixel units.
        std: channel standard deviations in pixel units.
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
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1), norm_layer(norm, width)]
            layers.append(activation_layer(activation))
            size, channels = (size + stride - 1) // stride, width
        self.features = nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))
        self.logits = nn.Linear(channels * size * size, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1]."""
        logits: torch.Tensor = self.logits(self.features(self.normalise(images)).flatten(1))
        return logits

"""The choice of a network by name.

A network F takes the scaled noisy image, the noise level, the label (``num_classes`` means none) and the
augmentation; it returns a tensor of the image's shape. The last layer starts at zero, so that an untrained denoiser
returns ``skip * noisy``.
"""

from __future__ import annotations

import torch
from torch import nn

from puma.errors import UsageError
from puma.generation.augment import AUGMENT_DIM
from puma.generation.config import DiffusionConfig
from puma.generation.mlp import ResidualMLP
from puma.generation.unet import UNet


def build_network(config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The network a configuration names, for images [C, H, W]; weights from torch's global generator.

    Raises:
        UsageError: the UNet cannot halve images of that size as often as its levels ask.
    """
    augment_dim = AUGMENT_DIM if config.augments else 0
    if config.network == "mlp":
        return ResidualMLP(
            shape,
            num_classes,
            width=config.width,
            blocks=config.blocks,
            dropout=config.dropout,
            augment_dim=augment_dim,
        )
    check_size(config, shape)
    network = UNet(
        shape,
        num_classes,
        width=config.width,
        multipliers=config.multipliers,
        blocks=config.blocks,
        attention=config.attention,
        dropout=config.dropout,
        augment_dim=augment_dim,
    )
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def check_size(config: DiffusionConfig, shape: tuple[int, int, int]) -> None:
    """Refuse images [C, H, W] that the configuration's network cannot take.

    Raises:
        UsageError: height or width is not divisible by 2 for each level below the first.
    """
    divisor = 2 ** (len(config.multipliers) - 1)
    if config.network == "unet" and (shape[1] % divisor or shape[2] % divisor):
        raise UsageError(
            f"images of {shape[1]}x{shape[2]} pixels do not fit the UNet",
            why=f"{len(config.multipliers)} levels halve them {len(config.multipliers) - 1} times: sizes must be "
            f"divisible by {divisor}",
            fix="load them with resize=, or give fewer multipliers",
        )

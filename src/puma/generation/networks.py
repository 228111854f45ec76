"""The networks F of the denoiser: a residual MLP for 8 to 16 pixels, and the UNet of diffusers from 16 pixels.

A network takes the scaled noisy image [B, C, H, W], c_noise = ln(sigma) / 4 [B], the label int64 [B] (``num_classes``
means none) and the augmentation vector [B, A] or None (all zero); it returns a tensor of the image's shape. The last
layer starts at zero, so that an untrained denoiser returns ``c_skip * noisy``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from puma.errors import UsageError
from puma.generation.augment import AUGMENT_DIM
from puma.generation.config import DiffusionConfig


class ResidualMLP(nn.Module):
    """The network F on the flattened image; by far the most training steps per second on a CPU."""

    frequencies: Tensor

    def __init__(
        self, config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int, augment_dim: int
    ) -> None:
        super().__init__()
        size, width = math.prod(shape), config.width
        frequencies = torch.exp(torch.linspace(math.log(0.5), math.log(50.0), 32))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.noise_in = nn.Linear(64, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.condition = nn.Linear(width, width)
        self.linear_in = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_MLPBlock(width, config.dropout) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width)
        self.linear_out = zero_init(nn.Linear(width, size))

    def forward(self, image: Tensor, noise: Tensor, label: Tensor, augment: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        angle = noise[:, None] * self.frequencies  # Fourier features of the noise level
        condition: Tensor = self.noise_in(torch.cat([angle.cos(), angle.sin()], dim=1)) + self.label(label)
        if self.augment is not None and augment is not None:
            condition = condition + self.augment(augment)
        condition = functional.silu(self.condition(functional.silu(condition)))
        hidden = self.linear_in(image.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        result: Tensor = self.linear_out(functional.silu(self.norm(hidden)))
        return result.view_as(image)


class _MLPBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = zero_init(nn.Linear(width, 2 * width))
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition).chunk(2, dim=1)
        inner = functional.silu(self.first(self.norm(hidden) * (1 + scale) + shift))
        result: Tensor = hidden + self.second(self.dropout(inner))
        return result


class DiffusersUNet(nn.Module):
    """diffusers' ``UNet2DModel`` as the network F: label and augmentation are added to its noise embedding.

    Every residual branch and the last layer start at zero, as in Karras et al. 2022.
    """

    def __init__(
        self, config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int, augment_dim: int
    ) -> None:
        super().__init__()
        channels, height, _ = shape
        width, levels = config.width, range(len(config.multipliers))
        attention = ["Attn" if height >> level in config.attention else "" for level in levels]
        self.unet: Any = import_diffusers("UNet2DModel")(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(width * multiplier for multiplier in config.multipliers),
            layers_per_block=config.blocks,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in attention),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(attention)),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
            dropout=config.dropout,
            attention_head_dim=math.gcd(width, 64),
            norm_num_groups=next(groups for groups in range(min(32, width // 4), 0, -1) if width % groups == 0),
        )
        zero_init(self.unet.conv_out)
        for module in self.unet.modules():
            if type(module).__name__ == "ResnetBlock2D":
                zero_init(module.conv2)
            elif type(module).__name__ == "Attention":
                zero_init(module.to_out[0])
        self.label = nn.Embedding(num_classes + 1, 4 * width)
        self.augment = nn.Linear(augment_dim, 4 * width, bias=False) if augment_dim else None

    def forward(self, image: Tensor, noise: Tensor, label: Tensor, augment: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        condition = self.label(label)
        if self.augment is not None and augment is not None:
            condition = condition + self.augment(augment)
        # its sinusoidal embedding expects time steps of 0 to 1000; c_noise is about -2 to 2
        result: Tensor = self.unet(
            image.contiguous(memory_format=torch.channels_last), 1000 * noise, class_labels=condition
        ).sample
        return result


def build_network(config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The network a configuration names, for images [C, H, W]; weights from torch's global generator.

    Raises:
        UsageError: see `check_network`.
    """
    check_network(config, shape)
    augment_dim = AUGMENT_DIM if config.augments else 0
    if config.network == "mlp":
        return ResidualMLP(config, shape, num_classes, augment_dim)
    network = DiffusersUNet(config, shape, num_classes, augment_dim)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def check_network(config: DiffusionConfig, shape: tuple[int, int, int]) -> None:
    """Refuse images [C, H, W] that the configuration's network cannot take.

    Raises:
        UsageError: height or width is not divisible by 2 for each level below the first, or diffusers is missing.
    """
    if config.network != "unet":
        return
    divisor = 2 ** (len(config.multipliers) - 1)
    if shape[1] % divisor or shape[2] % divisor:
        raise UsageError(
            f"images of {shape[1]}x{shape[2]} pixels do not fit the UNet",
            why=f"{len(config.multipliers)} levels halve them {len(config.multipliers) - 1} times: sizes must be "
            f"divisible by {divisor}",
            fix="load them with resize=, or give fewer multipliers",
        )
    import_diffusers("UNet2DModel")


def import_diffusers(name: str) -> Any:
    """A class of the diffusers library, which is an extra.

    Raises:
        UsageError: diffusers is not installed, or a torchvision that does not fit torch keeps it from loading.
    """
    try:
        import diffusers

        return getattr(diffusers, name)
    except ImportError:
        raise UsageError(
            "diffusers is not installed",
            why="the UNet for images above 16 pixels and pretrained pipelines come from it",
            fix="pip install 'puma-robust[diffusers]'",
        ) from None
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise UsageError(
            "diffusers cannot be imported beside the installed torchvision",
            why=str(error).splitlines()[-1],
            fix="uninstall torchvision, or install the one that matches this torch",
        ) from None


def zero_init(layer: nn.Linear | nn.Conv2d) -> Any:
    """Set a layer's weight and bias to zero and return it."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

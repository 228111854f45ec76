"""Small class-conditional networks for images of 8 to 16 pixels, and the choice of a network by name.

A network F takes the scaled noisy image, the noise level, the label (``num_classes`` means none) and the
augmentation; it returns a tensor of the image's shape. The last layer starts at zero, so that an untrained denoiser
returns ``skip * noisy``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from puma.generation.augment import AUGMENT_DIM
from puma.generation.config import DiffusionConfig


class NoiseEmbedding(nn.Module):
    """Fourier features of c_noise = ln(sigma) / 4, so that neighbouring noise levels are told apart."""

    frequencies: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(math.log(0.5), math.log(50.0), features // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, noise: Tensor) -> Tensor:
        """[B] -> [B, features]."""
        angle = noise[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Condition(nn.Module):
    """Noise level, label and augmentation as one vector [B, width]."""

    def __init__(self, width: int, num_classes: int, augment_dim: int) -> None:
        super().__init__()
        self.noise = NoiseEmbedding(64)
        self.first = nn.Linear(64, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.second = nn.Linear(width, width)

    def forward(self, noise: Tensor, label: Tensor, augment: Tensor | None) -> Tensor:
        """Noise [B], label int64 [B], augment [B, A] or None (all zero: not augmented) -> [B, width]."""
        mixed: Tensor = self.first(self.noise(noise)) + self.label(label)
        if self.augment is not None and augment is not None:
            mixed = mixed + self.augment(augment)
        return functional.silu(self.second(functional.silu(mixed)))


class ResidualMLP(nn.Module):
    """A residual MLP on the flattened image: by far the most steps per second on a CPU at 8x8 pixels."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: int = 256,
        blocks: int = 4,
        dropout: float = 0.0,
        augment_dim: int = 0,
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        self.condition = Condition(width, num_classes, augment_dim)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_MLPBlock(width, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.leave = _zeroed(nn.Linear(width, size))

    def forward(self, image: Tensor, noise: Tensor, label: Tensor, augment: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        condition = self.condition(noise, label, augment)
        hidden = self.enter(image.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        out: Tensor = self.leave(functional.silu(self.norm(hidden)))
        return out.view_as(image)


class _MLPBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = _zeroed(nn.Linear(width, 2 * width))
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition).chunk(2, dim=1)
        inner = functional.silu(self.first(self.norm(hidden) * (1 + scale) + shift))
        out: Tensor = hidden + self.second(self.dropout(inner))
        return out


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def build_network(config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The network a configuration names, for images [C, H, W]."""
    return ResidualMLP(
        shape,
        num_classes,
        width=config.width,
        blocks=config.blocks,
        dropout=config.dropout,
        augment_dim=AUGMENT_DIM if config.augment > 0 else 0,
    )

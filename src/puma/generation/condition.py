"""What a network is told besides the image: noise level, label and augmentation, as one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


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

"""A class-conditional UNet for images of 32 pixels: the DDPM++ shape of Karras et al. 2022, small.

Residual blocks with GroupNorm, scaled and shifted by the condition (noise level, label, augmentation), self-attention
at low resolutions, average pooling down and nearest neighbours up. Every residual branch ends in a zero-initialised
convolution, so that the network starts near the identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from puma.generation.condition import Condition


class UNet(nn.Module):
    """The network F for images [C, H, W] whose height and width are divisible by ``2 ** (len(multipliers) - 1)``.

    Args:
        shape: (C, H, W).
        num_classes: labels are 0..num_classes, the last one meaning "no label".
        width: channels of the first level.
        multipliers: channels of each level, in widths.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: heights (in pixels) of the levels with self-attention.
        dropout: inside the residual blocks.
        augment_dim: length of the augmentation vector; 0 for none.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (16, 8),
        dropout: float = 0.0,
        augment_dim: int = 0,
    ) -> None:
        super().__init__()
        channels, height, _ = shape
        size = 4 * width
        self.condition = Condition(size, num_classes, augment_dim)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        current, saved = width, [width]
        for level, multiplier in enumerate(multipliers):
            attend = height >> level in attention
            if level:
                self.down.append(_Block(current, current, size, dropout, resample="down"))
                saved.append(current)
            for _ in range(blocks):
                self.down.append(_Block(current, multiplier * width, size, dropout, attend=attend))
                current = multiplier * width
                saved.append(current)
        self.middle = nn.ModuleList(
            [_Block(current, current, size, dropout, attend=True), _Block(current, current, size, dropout)]
        )
        for level, multiplier in reversed(list(enumerate(multipliers))):
            attend = height >> level in attention
            for _ in range(blocks + 1):
                self.up.append(_Block(current + saved.pop(), multiplier * width, size, dropout, attend=attend))
                current = multiplier * width
            if level:
                self.up.append(_Block(current, current, size, dropout, resample="up"))
        self.norm = _group_norm(current)
        self.leave = _zeroed(nn.Conv2d(current, channels, 3, padding=1))

    def forward(self, image: Tensor, noise: Tensor, label: Tensor, augment: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        condition = self.condition(noise, label, augment)
        hidden = self.enter(image.contiguous(memory_format=torch.channels_last))
        saved = [hidden]
        for block in self.down:
            hidden = block(hidden, condition)
            saved.append(hidden)
        for block in self.middle:
            hidden = block(hidden, condition)
        for block in self.up:
            takes = block.channels - hidden.shape[1]
            hidden = block(torch.cat([hidden, saved.pop()], dim=1) if takes else hidden, condition)
        out: Tensor = self.leave(functional.silu(self.norm(hidden)))
        return out


class _Block(nn.Module):
    """Residual block, optionally after a change of resolution and before self-attention."""

    def __init__(
        self, channels: int, out: int, condition: int, dropout: float, *, attend: bool = False, resample: str = ""
    ) -> None:
        super().__init__()
        self.channels, self.resample = channels, resample
        self.norm_in = _group_norm(channels)
        self.first = nn.Conv2d(channels, out, 3, padding=1)
        self.modulate = nn.Linear(condition, 2 * out)
        self.norm_out = _group_norm(out)
        self.dropout = nn.Dropout(dropout)
        self.second = _zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.attention = _Attention(out) if attend else None

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        inner = self._resampled(functional.silu(self.norm_in(hidden)))
        inner = self.first(inner)
        scale, shift = self.modulate(condition)[:, :, None, None].chunk(2, dim=1)
        inner = functional.silu(self.norm_out(inner) * (1 + scale) + shift)
        inner = self.second(self.dropout(inner))
        out: Tensor = (self.skip(self._resampled(hidden)) + inner) * math.sqrt(0.5)
        return out if self.attention is None else self.attention(out)

    def _resampled(self, hidden: Tensor) -> Tensor:
        if self.resample == "down":
            return functional.avg_pool2d(hidden, 2)
        if self.resample == "up":
            return functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
        return hidden


class _Attention(nn.Module):
    """Self-attention over the pixels, one head per 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 64)
        self.norm = _group_norm(channels)
        self.enter = nn.Conv2d(channels, 3 * channels, 1)
        self.leave = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, channels, height, width = hidden.shape
        # [B, 3C, H, W] -> three of [B, heads, H*W, C/heads]
        mixed = self.enter(self.norm(hidden)).view(batch, 3, self.heads, channels // self.heads, height * width)
        query, key, value = mixed.transpose(3, 4).unbind(1)
        found = functional.scaled_dot_product_attention(query, key, value)
        found = found.transpose(2, 3).reshape(batch, channels, height, width)
        out: Tensor = (hidden + self.leave(found)) * math.sqrt(0.5)
        return out


def _group_norm(channels: int) -> nn.GroupNorm:
    groups = next(groups for groups in range(min(32, max(1, channels // 4)), 0, -1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

"""Leak-free augmentation (Karras et al. 2022, section 5): the network is told what was done to each image.

A geometric augmentation multiplies little data, but a generator that does not know of it draws shifted and rotated
images too. Here every augmented image comes with a vector that says how it was changed; sampling with the zero
vector gives images like the untouched ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

AUGMENT_DIM = 6
"""Length of the vector: flipped, shift along y and x, log2 of the scale, sin(angle), 1 - cos(angle)."""

_SHIFT = 0.125  # standard deviation, in image sizes
_SCALE = 0.2  # standard deviation of log2
_ANGLE = 0.3  # largest angle in radians; digits are not the same upside down


def augment(
    images: Tensor, probability: float, generator: torch.Generator, *, flip: bool = False
) -> tuple[Tensor, Tensor]:
    """Shift, scale, rotate and (if ``flip``) mirror each image, each with ``probability``.

    Args:
        images: float [B, C, H, W]; what comes in from outside repeats the border.
        probability: of each change, independently; 0 changes nothing.
        generator: source of all randomness.
        flip: whether left and right may be exchanged.

    Returns:
        The images, and what was done to them: float32 [B, AUGMENT_DIM], zero where nothing was.
    """
    count, device = len(images), images.device

    def chance() -> Tensor:
        return (torch.rand(count, generator=generator, device=device) < probability).float()

    def normal() -> Tensor:
        return torch.randn(count, generator=generator, device=device)

    mirrored = chance() if flip else torch.zeros(count, device=device)
    moved, scaled, turned = chance(), chance(), chance()
    shift_y, shift_x = moved * _SHIFT * normal(), moved * _SHIFT * normal()
    scale = scaled * _SCALE * normal()
    angle = turned * _ANGLE * (2 * torch.rand(count, generator=generator, device=device) - 1)
    told = torch.stack([mirrored, shift_y, shift_x, scale, angle.sin(), 1 - angle.cos()], dim=1)
    changed = told.abs().sum(1) > 0
    if not bool(changed.any()):
        return images, told
    height, width = images.shape[2:]
    zoom, aspect = torch.exp2(-scale), height / width
    sign = 1 - 2 * mirrored
    rows = [
        torch.stack([sign * zoom * angle.cos(), -zoom * angle.sin() * aspect, -2 * shift_x], dim=1),
        torch.stack([sign * zoom * angle.sin() / aspect, zoom * angle.cos(), -2 * shift_y], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    warped = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(changed[:, None, None, None], warped, images), told

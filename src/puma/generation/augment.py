"""Non-leaking augmentation (Karras et al. 2022, section 5): the network gets a vector of what was done to each image.

Without it a generator trained on shifted and rotated images samples shifted and rotated images. With it, sampling
under the zero vector gives images like the untouched ones, and the network still learns from the changed ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

AUGMENT_DIM = 8
"""Length of the vector: mirrored, whole-pixel shift (y, x), fractional shift (y, x), log2 scale, sin, 1 - cos."""

_SHIFT = 0.125  # largest whole-pixel shift, and standard deviation of the fractional one, in image sizes
_SCALE = 0.2  # standard deviation of log2
_ANGLE = 0.3  # largest angle in radians: small, for a 6 upside down is a 9


def augment(
    images: Tensor, generator: torch.Generator, *, shift: float = 0.0, flip: float = 0.0, warp: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Change some images and describe the change; pixels from outside repeat the border.

    Args:
        images: float [B, C, H, W].
        generator: source of all randomness.
        shift: probability of a shift by whole pixels, up to 1/8 of the size each way; blurs nothing.
        flip: probability of exchanging left and right.
        warp: probabilities of scaling, of rotating and of a fractional shift, each on its own (bilinear).

    Returns:
        The images, and the augmentation vectors: float32 [B, AUGMENT_DIM], zero where nothing was done.
    """
    applied = torch.zeros(len(images), AUGMENT_DIM, device=images.device)
    if flip > 0:
        mirrored = _bernoulli(len(images), flip, generator)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        applied[:, 0] = mirrored.float()
    if shift > 0:
        images, applied[:, 1:3] = _shift(images, shift, generator)
    if warp > 0:
        images, applied[:, 3:] = _warp(images, warp, generator)
    return images, applied


def _shift(images: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    count, _, *size = images.shape
    moved = _bernoulli(count, probability, generator)
    sources, applied = [], []
    for length in size:
        reach = max(1, round(_SHIFT * length))
        by = torch.randint(-reach, reach + 1, (count,), generator=generator, device=images.device) * moved
        sources.append((torch.arange(length, device=images.device) + by[:, None]).clamp(0, length - 1))
        applied.append(by / reach)
    rows, columns = sources
    each = torch.arange(count, device=images.device)[:, None, None]
    shifted = images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return shifted, torch.stack(applied, dim=1)


def _warp(images: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    count, device = len(images), images.device
    moved, scaled, rotated = (_bernoulli(count, probability, generator).float() for _ in range(3))
    shift_y, shift_x, scale = (
        chosen * torch.randn(count, generator=generator, device=device) * deviation
        for chosen, deviation in ((moved, _SHIFT), (moved, _SHIFT), (scaled, _SCALE))
    )
    angle = rotated * _ANGLE * (2 * torch.rand(count, generator=generator, device=device) - 1)
    applied = torch.stack([shift_y, shift_x, scale, angle.sin(), 1 - angle.cos()], dim=1)
    zoom, aspect = torch.exp2(-scale), images.shape[2] / images.shape[3]
    rows = [
        torch.stack([zoom * angle.cos(), -zoom * angle.sin() * aspect, -2 * shift_x], dim=1),
        torch.stack([zoom * angle.sin() / aspect, zoom * angle.cos(), -2 * shift_y], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    warped = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    changed = (applied != 0).any(1)
    return torch.where(changed[:, None, None, None], warped, images), applied


def _bernoulli(count: int, probability: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device) < probability

"""Augmentation of a batch where it lies, from draws that the caller makes: no state, no loop over images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shifts:
    """Where each image is cropped and whether it is mirrored: int64 ``[B]``, int64 ``[B]``, bool ``[B]``."""

    down: Tensor
    right: Tensor
    mirrored: Tensor

    def take(self, places: Tensor) -> Shifts:
        """The draws of some images of the batch."""
        return Shifts(self.down[places], self.right[places], self.mirrored[places])


def draw_shifts(count: int, crop: int, flip: bool, generator: torch.Generator) -> Shifts:
    """Draw a shift of -crop..crop in both directions, uniformly, and a mirror image every other time if ``flip``."""
    device = generator.device
    offsets = torch.randint(0, 2 * crop + 1, (2, count), generator=generator, device=device)
    mirrored = torch.rand(count, generator=generator, device=device) < (0.5 if flip else 0.0)
    return Shifts(offsets[0] - crop, offsets[1] - crop, mirrored)


def shift(images: Tensor, shifts: Shifts) -> Tensor:
    """Crop (after zero padding) and mirror each image of ``[B, C, H, W]``, of any type.

    Pixel (y, x) of the result is pixel (y + down, x' + right) of the image, 0 outside it, with x' counted from the
    right where the image is mirrored: the crop comes first, then the mirror, as in the reference code.
    """
    count, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) + shifts.down[:, None]  # [B, H]
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(shifts.mirrored[:, None], width - 1 - columns, columns) + shifts.right[:, None]  # [B, W]
    inside = _within(rows, height)[:, None, :, None] & _within(columns, width)[:, None, None, :]
    which = torch.arange(count, device=images.device)[:, None, None]
    picked = images.permute(0, 2, 3, 1)[
        which, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    ]
    return picked.permute(0, 3, 1, 2) * inside


@dataclass(frozen=True)
class Patches:
    """CutMix (arXiv 1905.04899): for each image a partner's place in the batch and a box to paste from it."""

    partner: Tensor
    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor

    def take(self, places: Tensor) -> Patches:
        """The draws of some images of the batch."""
        return Patches(*(getattr(self, name)[places] for name in self.__dataclass_fields__))

    def share(self, height: int, width: int) -> Tensor:
        """What is left of each image itself, float32 ``[B]`` in [0, 1]."""
        area = (self.bottom - self.top) * (self.right - self.left)
        return 1 - area.to(torch.float32) / (height * width)


def draw_patches(count: int, height: int, width: int, generator: torch.Generator) -> Patches:
    """Draw partners and boxes: area share uniform in [0, 1] (Beta(1, 1)), centre uniform, cut off at the border."""
    device = generator.device
    partner = torch.randperm(count, generator=generator, device=device)
    draws = torch.rand(3, count, generator=generator, device=device)
    side = (1 - draws[0]).sqrt()
    edges = []
    for length, centre in ((height, draws[1]), (width, draws[2])):
        middle, half = (centre * length).long(), (side * length).long() // 2
        edges += [(middle - half).clamp(0, length), (middle + half).clamp(0, length)]
    return Patches(partner, *edges)


def paste(images: Tensor, partners: Tensor, patches: Patches) -> Tensor:
    """Replace each image's box by its partner's pixels there; both ``[B, C, H, W]``."""
    height, width = images.shape[2:]
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    down = (rows >= patches.top[:, None]) & (rows < patches.bottom[:, None])
    across = (columns >= patches.left[:, None]) & (columns < patches.right[:, None])
    return torch.where(down[:, None, :, None] & across[:, None, None, :], partners, images)


def _within(places: Tensor, length: int) -> Tensor:
    return (places >= 0) & (places < length)

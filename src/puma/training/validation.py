"""The held-out images that choose the best checkpoint: real ones, stratified, never the test set."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from puma.attacks.pgd import pgd
from puma.data.pool import Pool, to_tensor
from puma.data.sampler import stratified_rows
from puma.devices import Devices
from puma.errors import UsageError
from puma.rng import mixed_key
from puma.threat import ThreatModel
from puma.training.recipe import Recipe

_SPLIT = 21


def held_out(pool: Pool, count: int, seed: int) -> NDArray[np.int64]:
    """Rows of the pool's real images to hold out: ``count``, stratified by class; the same for every plan.

    Raises:
        UsageError: more than half of the real images.
    """
    real = np.flatnonzero(~pool.synthetic)
    if count > len(real) // 2:
        raise UsageError(
            f"{count:,} validation images are more than half of the {len(real):,} real ones",
            fix="--validation 0, or fewer",
        )
    if count == 0:
        return real[:0]
    return real[stratified_rows(pool.labels[real], count, mixed_key(seed, _SPLIT))]


class Validation:
    """Clean accuracy, and robust accuracy under PGD with the CW loss at full eps, of a network in eval mode.

    The CW loss, because PGD with cross entropy overstates robustness, and not equally for all strategies.

    Args:
        images: uint8 ``[V, H, W, C]``.
        labels: int64 ``[V]``.
        threat: the threat model of the training.
        recipe: attack steps and step size, batch size.
        devices: each process measures its share.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        threat: ThreatModel,
        recipe: Recipe,
        devices: Devices,
    ) -> None:
        self.threat, self.recipe, self.devices, self.count = threat, recipe, devices, len(labels)
        share = slice(devices.rank, None, devices.world_size)
        self._images, self._labels = images[share], torch.from_numpy(np.asarray(labels[share]))

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """(clean accuracy, robust accuracy), fractions; the model has to be in eval mode on the training device."""
        device, size = self.devices.device, self.recipe.batch_size
        right = torch.zeros(2, dtype=torch.float64, device=device)
        for first in range(0, len(self._labels), size):
            images = to_tensor(self._images[first : first + size], device)
            labels = self._labels[first : first + size].to(device)
            attacked = pgd(
                model,
                images,
                labels,
                threat=self.threat,
                steps=self.recipe.validation_steps,
                step_size=self.recipe.attack_step(self.threat.norm) * self.threat.eps,
                loss="cw",
                generator=torch.Generator(device).manual_seed(mixed_key(first, self.devices.rank) >> 1),
            )
            with torch.no_grad():
                clean, robust = (model(batch).argmax(1) == labels for batch in (images, attacked))
            right += torch.stack([clean.sum(), (clean & robust).sum()])
        clean_accuracy, robust_accuracy = (self.devices.all_reduce(right) / self.count).tolist()
        return clean_accuracy, robust_accuracy

"""The held-out images that choose the best checkpoint: real ones, stratified, never the test set."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma.attacks.pgd import ascend, start_noise
from puma.data.pool import Pool
from puma.data.sampler import stratified_rows
from puma.data.tensors import to_tensor
from puma.devices import Devices
from puma.errors import UsageError
from puma.losses import carlini_wagner
from puma.models.modes import attack_mode
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
        self.threat, self.recipe, self.devices = threat, recipe, devices
        self.count = len(labels)
        share = slice(devices.rank, None, devices.world_size)
        self._images, self._labels = images[share], torch.from_numpy(np.asarray(labels[share]))
        self._first = devices.rank

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """(clean accuracy, robust accuracy), fractions; the model has to be in eval mode on the training device."""
        right = torch.zeros(2, dtype=torch.float64, device=self.devices.device)
        for first in range(0, len(self._labels), self.recipe.batch_size):
            part = slice(first, first + self.recipe.batch_size)
            images = to_tensor(self._images[part], self.devices.device)
            right += self._right(model, images, self._labels[part].to(self.devices.device), first)
        clean, robust = (self.devices.all_reduce(right) / self.count).tolist()
        return clean, robust

    def _right(self, model: nn.Module, images: Tensor, labels: Tensor, first: int) -> Tensor:
        linf = self.threat.norm == "Linf"
        step = (self.recipe.attack_step_linf if linf else self.recipe.attack_step_l2) * self.threat.eps
        generator = torch.Generator(images.device).manual_seed(mixed_key(first, self._first) >> 1)
        noise = start_noise(images.shape, "uniform", self.threat, generator, images.device)
        radius = torch.full((len(images),), self.threat.eps, device=images.device)
        with attack_mode(model):
            attacked = ascend(
                lambda x, rows: carlini_wagner(model(x), labels[rows]),
                images,
                radius,
                noise,
                self.threat,
                steps=self.recipe.validation_steps,
                step_size=step,
            )
        with torch.no_grad():
            hits = [model(batch).argmax(1) == labels for batch in (images, attacked)]
        return torch.stack([hits[0].sum(), (hits[0] & hits[1]).sum()]).to(torch.float64)

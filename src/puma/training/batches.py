"""Batches as functions of (seed, step): rows, augmentation and the attack's start, each from its own counter.

Every draw is made for the whole batch and each process takes its places of it, so that the images and the noise of a
step do not depend on how many processes share it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from puma.attacks.pgd import start_noise
from puma.data.pool import Pool
from puma.data.sampler import BatchSampler
from puma.errors import UsageError
from puma.rng import mixed_key
from puma.threat import ThreatModel
from puma.training.augment import Patches, Shifts, draw_patches, draw_shifts, paste, shift
from puma.training.recipe import Recipe

_AUGMENT, _START = 11, 12
_Draws = TypeVar("_Draws", Shifts, Patches)


@dataclass
class Batch:
    """One process's share of a batch: images float ``[b, C, H, W]``, labels ``[b]`` or ``[b, K]``, eps ``[b]``."""

    images: Tensor
    labels: Tensor
    eps: Tensor
    noise: Tensor | None
    rows: NDArray[np.int64]


class Batches:
    """All batches of a training.

    Args:
        pool: the images.
        keep: bool ``[N]``, rows to draw from.
        eps: float32 ``[N]``, their radii.
        recipe: batch size, synthetic share, augmentation.
        threat: norm and radius of the start noise.
        seed: another seed is another order and other noise.
        device: where batches are put.
        rank: this process.
        world: how many share each batch.

    Raises:
        UsageError: the batch cannot be shared evenly, or is larger than what is kept.
    """

    def __init__(
        self,
        pool: Pool,
        keep: NDArray[np.bool_],
        eps: NDArray[np.float32],
        recipe: Recipe,
        threat: ThreatModel,
        *,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if recipe.batch_size % world:
            raise UsageError(f"a batch of {recipe.batch_size} cannot be shared evenly by {world} processes")
        kept = int(np.count_nonzero(keep))
        if recipe.batch_size > kept:
            raise UsageError(
                f"a batch of {recipe.batch_size} is larger than the {kept:,} images to train on",
                fix="--set batch_size=... or prune less",
            )
        self.pool, self.eps, self.recipe, self.threat = pool, eps, recipe, threat
        self.seed, self.device = seed, device
        self.sampler = BatchSampler(
            pool.synthetic, keep=keep, batch_size=recipe.batch_size, synthetic_share=recipe.synthetic_share, seed=seed
        )
        height, width, self._channels = pool.image_shape
        self._size = (height, width)
        self._start = recipe.attack_start_linf if threat.norm == "Linf" else recipe.attack_start_l2
        self._places = torch.arange(rank, recipe.batch_size, world)
        self._thread = ThreadPoolExecutor(1, "puma-batches")
        self._pending: tuple[int, Future[Batch]] | None = None

    def rows(self, step: int) -> NDArray[np.int64]:
        """Pool rows of the whole batch of a step."""
        return self.sampler.indices(step)

    def get(self, step: int, *, ahead: bool = False) -> Batch:
        """This process's share of the batch of optimiser step ``step``.

        With an accelerator and ``ahead``, the next step's is prepared meanwhile by another thread.
        """
        if self._pending is not None and self._pending[0] == step:
            batch = self._pending[1].result()
        else:
            batch = self._make(step)
        self._pending = None
        if ahead and self.device.type != "cpu":
            self._pending = step + 1, self._thread.submit(self._make, step + 1)
        return batch

    def _make(self, step: int) -> Batch:
        rows, mine, recipe = self.rows(step), self._places.numpy(), self.recipe
        draws = self._generator(_AUGMENT, step, "cpu")
        size, (height, width) = recipe.batch_size, self._size
        shifts = draw_shifts(size, recipe.crop, recipe.flip, draws) if recipe.crop or recipe.flip else None

        def read(places: NDArray[np.int64]) -> Tensor:
            images = self._move(self.pool.read(rows[places])).permute(0, 3, 1, 2)
            if shifts is not None:
                images = shift(images, _to(shifts.take(torch.from_numpy(places)), self.device))
            return images

        images, labels = read(mine), self._move(self.pool.labels[rows[mine]])
        eps = self._move(self.eps[rows[mine]])
        if recipe.cutmix:
            patches = draw_patches(size, height, width, draws)
            partners = patches.partner.numpy()[mine]
            own = patches.take(self._places)
            share = own.share(height, width).to(self.device)
            images = paste(images, read(partners), _to(own, self.device))
            other = self._move(self.pool.labels[rows[partners]])
            classes = self.pool.num_classes
            labels = torch.lerp(F.one_hot(other, classes).float(), F.one_hot(labels, classes).float(), share[:, None])
            eps = torch.lerp(self._move(self.eps[rows[partners]]), eps, share)
        format_ = torch.channels_last if recipe.channels_last else torch.contiguous_format
        pixels = images.to(torch.float32).div_(255).contiguous(memory_format=format_)
        return Batch(pixels, labels, eps, self._noise(step), rows)

    def _move(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _noise(self, step: int) -> Tensor | None:
        shape = (self.recipe.batch_size, self._channels, *self._size)
        noise = start_noise(shape, self._start, self.threat, self._generator(_START, step, self.device), self.device)
        if noise is None or len(self._places) == len(noise):
            return noise
        return noise[self._places.to(self.device)]

    def _generator(self, stream: int, step: int, device: torch.device | str) -> torch.Generator:
        return torch.Generator(device).manual_seed(mixed_key(self.seed, stream, step) >> 1)


def _to(draws: _Draws, device: torch.device) -> _Draws:
    return draws if device.type == "cpu" else type(draws)(*(value.to(device) for value in vars(draws).values()))

"""Images of a training: batches as functions of (seed, step), and the held-out images of validation.

Every draw is made for the whole batch and each process takes its places of it, so that the images and the noise of a
step do not depend on how many processes share it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma.attacks.pgd import pgd, start_noise
from puma.data.pool import BatchSampler, Pool, to_tensor
from puma.data.source import Rows, stratified_rows
from puma.devices import Devices
from puma.errors import UsageError
from puma.models.checks import apply_model
from puma.rng import mixed_key
from puma.threat import ThreatModel
from puma.training.recipe import Recipe

_AUGMENT, _START, _SPLIT = 11, 12, 21


class Shifts(NamedTuple):
    """Where each image is cropped and whether it is mirrored: int64 ``[B]``, int64 ``[B]``, bool ``[B]``."""

    down: Tensor
    right: Tensor
    mirrored: Tensor


def draw_shifts(count: int, crop: int, flip: bool, generator: torch.Generator) -> Shifts:
    """Shifts of -crop..crop pixels both ways, uniform, and a mirror image every other time if ``flip``."""
    device = generator.device
    offsets = torch.randint(0, 2 * crop + 1, (2, count), generator=generator, device=device)
    mirrored = torch.rand(count, generator=generator, device=device) < (0.5 if flip else 0.0)
    return Shifts(offsets[0] - crop, offsets[1] - crop, mirrored)


def shift(images: Tensor, shifts: Shifts) -> Tensor:
    """Crop (after zero padding) and then mirror each image of ``[B, C, H, W]``, of any type.

    Pixel (y, x) of the result is pixel (y + down, x' + right) of the image, 0 outside it, with x' counted from the
    right where the image is mirrored.
    """
    count, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) + shifts.down[:, None]  # [B, H]
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(shifts.mirrored[:, None], width - 1 - columns, columns) + shifts.right[:, None]  # [B, W]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    which = torch.arange(count, device=images.device)[:, None, None]
    picked = images.permute(0, 2, 3, 1)[
        which, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    ]
    return picked.permute(0, 3, 1, 2) * inside


@dataclass
class Batch:
    """One process's share of a batch."""

    images: Tensor  # float [b, C, H, W] in [0, 1]
    labels: Tensor  # int64 [b]
    eps: Tensor  # float32 [b]
    noise: Tensor | None  # start of the attack in units of each image's eps; None: the images themselves
    rows: Rows  # int64 [B], pool rows of the whole batch

    def __len__(self) -> int:
        return len(self.eps)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of ``size`` images; the last may be smaller."""
        places = [slice(first, first + size) for first in range(0, len(self), size)]
        noises = [None if self.noise is None else self.noise[part] for part in places]
        given = zip(places, noises, strict=True)
        return [Batch(self.images[p], self.labels[p], self.eps[p], noise, self.rows) for p, noise in given]


class Batches:
    """All batches of a training: rows of ``pool`` where ``keep`` (bool ``[N]``) says so, each with its ``eps`` ``[N]``.

    Another ``seed`` is another order and other noise. The processes of ``devices`` share each batch; `UsageError` where
    that cannot be done evenly, or where it is larger than what is kept.
    """

    def __init__(
        self,
        pool: Pool,
        keep: NDArray[np.bool_],
        eps: NDArray[np.float32],
        recipe: Recipe,
        threat: ThreatModel,
        devices: Devices,
        *,
        seed: int,
    ) -> None:
        size, world, kept = recipe.batch_size, devices.world_size, int(np.count_nonzero(keep))
        if size % world:
            raise UsageError(f"a batch of {size} cannot be shared evenly by {world} processes")
        if size > kept:
            what = f"a batch of {size} is larger than the {kept:,} images to train on"
            raise UsageError(what, fix="--set batch_size=... or prune less")
        self.pool, self.eps, self.recipe, self.threat = pool, eps, recipe, threat
        self.seed, self.device = seed, devices.device
        share = recipe.synthetic_share
        self.sampler = BatchSampler(pool.synthetic, keep=keep, batch_size=size, synthetic_share=share, seed=seed)
        self._places = torch.arange(devices.rank, size, world)
        self._thread = ThreadPoolExecutor(1, "puma-batches")
        self._pending: tuple[int, Future[Batch]] | None = None

    def get(self, step: int, *, ahead: bool = False) -> Batch:
        """This process's share of the batch of a step; ``ahead``: an accelerator's next one is prepared meanwhile."""
        ready, self._pending = self._pending, None
        batch = ready[1].result() if ready and ready[0] == step else self._make(step)
        if ahead and self.device.type != "cpu":
            self._pending = step + 1, self._thread.submit(self._make, step + 1)
        return batch

    def _make(self, step: int) -> Batch:
        recipe, rows, places = self.recipe, self.sampler.indices(step), self._places
        mine = rows[places.numpy()]
        images = self._move(self.pool.read(mine)).permute(0, 3, 1, 2)
        if recipe.crop or recipe.flip:
            shifts = draw_shifts(recipe.batch_size, recipe.crop, recipe.flip, self._generator(_AUGMENT, step, "cpu"))
            images = shift(images, Shifts(*(self._move(values[places]) for values in shifts)))
        format_ = torch.channels_last if recipe.channels_last else torch.contiguous_format
        images = images.to(torch.float32).div_(255).contiguous(memory_format=format_)
        shape, draws = (recipe.batch_size, *images.shape[1:]), self._generator(_START, step, self.device)
        noise = start_noise(shape, recipe.attack(self.threat.norm)[1], self.threat, draws, self.device)
        if noise is not None and len(places) < len(noise):
            noise = noise[self._move(places)]
        return Batch(images, self._move(self.pool.labels[mine]), self._move(self.eps[mine]), noise, rows)

    def _move(self, array: NDArray[Any] | Tensor) -> Tensor:
        tensor = torch.as_tensor(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _generator(self, stream: int, step: int, device: torch.device | str) -> torch.Generator:
        return torch.Generator(device).manual_seed(mixed_key(self.seed, stream, step) >> 1)


def held_out(pool: Pool, count: int, seed: int) -> Rows:
    """Rows of the pool's real images to hold out: ``count`` (at most half), stratified; the same for every plan."""
    real = np.flatnonzero(~pool.synthetic)
    if count > len(real) // 2:
        what = f"{count:,} validation images are more than half of the {len(real):,} real ones"
        raise UsageError(what, fix="--validation 0, or fewer")
    return real[:0] if count == 0 else real[stratified_rows(pool.labels[real], count, mixed_key(seed, _SPLIT))]


class Validation:
    """Clean accuracy, and robust accuracy under PGD at full eps, on ``rows`` of a pool, which the processes share.

    With the CW loss: PGD with cross entropy overstates robustness, and not equally for all strategies.
    """

    def __init__(self, pool: Pool, rows: Rows, threat: ThreatModel, recipe: Recipe, devices: Devices) -> None:
        self.threat, self.recipe, self.devices, self.count = threat, recipe, devices, len(rows)
        share = rows[devices.rank :: devices.world_size]
        self._images, self._labels = pool.read(share), torch.from_numpy(pool.labels[share])

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """(clean accuracy, robust accuracy), fractions; the model has to be in eval mode on the training device."""
        device, size = self.devices.device, self.recipe.batch_size
        right = torch.zeros(2, dtype=torch.float64, device=device)
        step_size = self.recipe.attack(self.threat.norm)[0] * self.threat.eps
        attack = partial(pgd, threat=self.threat, steps=self.recipe.validation_steps, step_size=step_size, loss="cw")
        for first in range(0, len(self._labels), size):
            images = to_tensor(self._images[first : first + size], device)
            labels = self._labels[first : first + size].to(device)
            generator = torch.Generator(device).manual_seed(mixed_key(first, self.devices.rank) >> 1)
            attacked = attack(model, images, labels, generator=generator)
            with torch.no_grad():
                clean, robust = (apply_model(model, batch).argmax(1) == labels for batch in (images, attacked))
            right += torch.stack([clean.sum(), (clean & robust).sum()])
        clean_accuracy, robust_accuracy = (self.devices.all_reduce(right) / self.count).tolist()
        return clean_accuracy, robust_accuracy

"""From uint8 images to the tensors that networks take; a plan applied to a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puma.data.pool import Pool
from puma.data.source import Pixels, Rows, Source, checked_row

if TYPE_CHECKING:
    from puma.plan import Plan


def to_tensor(images: Pixels | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Turn uint8 ``[B, H, W, C]`` (0..255) into contiguous float32 ``[B, C, H, W]`` in [0, 1].

    The bytes are moved to ``device`` first and become floats there: a quarter of the traffic.

    >>> to_tensor(np.full((2, 4, 4, 3), 255, np.uint8)).shape
    torch.Size([2, 3, 4, 4])
    """
    batch = images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))
    if device is not None:
        target = torch.device(device)
        pinned = batch.pin_memory() if target.type == "cuda" and not batch.is_cuda else batch
        batch = pinned.to(target, non_blocking=True)
    return batch.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)


def read_batch(source: Source, rows: Rows, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Rows of a source or pool as ``(float32 [B, C, H, W] in [0, 1], int64 [B])`` on ``device``, read as one block."""
    labels = torch.from_numpy(np.asarray(source.labels[rows], dtype=np.int64))
    return to_tensor(source.read(rows), device), labels if device is None else labels.to(device)


class PlannedDataset:
    """The kept images of a pool, each with its own eps, for anybody's training loop.

    ``dataset[i]`` is ``(float32 tensor [C, H, W] in [0, 1], label, eps)``; ``dataset.index[i]`` its row in the pool.
    A ``torch`` ``DataLoader`` takes it as it is (and fetches each batch in one read); its batches have float32 images,
    int64 labels and float32 eps.

    Args:
        pool: the pool (or its one source) that the plan was made for.
        plan: which rows are kept, and their eps.
        transform: applied to each image tensor.

    Raises:
        DataError: the plan is of another pool.
    """

    def __init__(self, pool: Source, plan: Plan, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.pool = pool if isinstance(pool, Pool) else Pool([pool])
        self.pool.check_plan(plan)
        self.plan, self.transform = plan, transform
        self.index: NDArray[np.int64] = np.flatnonzero(plan.keep)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> tuple[Tensor, int, np.float32]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[tuple[Tensor, int, np.float32]]:
        """Several items in one read; ``DataLoader`` calls this."""
        rows = self.index[[checked_row(item, len(self)) for item in items]]
        images: Sequence[Tensor] = list(to_tensor(self.pool.read(rows)))
        if self.transform is not None:
            images = [self.transform(image) for image in images]
        eps = self.plan.eps[rows].astype(np.float32, copy=False)  # Python floats would be collated to float64
        return list(zip(images, self.pool.labels[rows].tolist(), eps, strict=True))

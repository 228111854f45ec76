"""A plan applied to a pool, as an ordinary map-style dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from puma.data.pool import Pool
from puma.data.source import Source, checked_row
from puma.data.tensors import to_tensor
from puma.errors import DataError

if TYPE_CHECKING:
    from puma.plan import Plan

Item = tuple[Tensor, int, float]


class PlannedDataset:
    """The kept images of a pool, each with its own attack norm, for anybody's training loop.

    ``dataset[i]`` is ``(float32 tensor [C, H, W] in [0, 1], label, eps)``; ``dataset.index[i]`` its row in the pool.
    A ``torch`` ``DataLoader`` takes it as it is (and fetches each batch in one read).

    Args:
        pool: the pool (or its one source) that the plan was made for.
        plan: which rows are kept, and their eps.
        transform: applied to each image tensor.

    Raises:
        DataError: the plan is of another pool.
    """

    def __init__(self, pool: Pool | Source, plan: Plan, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.pool = pool if isinstance(pool, Pool) else Pool([pool])
        check_plan(self.pool, plan)
        self.plan, self.transform = plan, transform
        self.index: NDArray[np.int64] = np.flatnonzero(plan.keep)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Item:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[Item]:
        """Several items in one read; ``DataLoader`` calls this."""
        rows = self.index[[checked_row(item, len(self)) for item in items]]
        images: Sequence[Tensor] = list(to_tensor(self.pool.read(rows)))
        if self.transform is not None:
            images = [self.transform(image) for image in images]
        labels, eps = self.pool.labels[rows].tolist(), self.plan.eps[rows].tolist()
        return list(zip(images, labels, eps, strict=True))


def check_plan(pool: Pool, plan: Plan) -> None:
    """Refuse a plan of another pool.

    Raises:
        DataError: names both.
    """
    if len(plan.keep) != len(pool):
        raise DataError(f"the plan has {len(plan.keep):,} rows, the pool {len(pool):,}", fix="plan this pool again")
    theirs = (plan.meta.get("pool") or {}).get("fingerprint")
    if theirs is not None and theirs != pool.fingerprint:
        raise DataError(
            f"the plan is of another pool ({theirs[:12]}) than this one ({pool.fingerprint[:12]})",
            why="the same number of rows, but not the same images, order or roles",
            fix="score and plan this pool",
        )

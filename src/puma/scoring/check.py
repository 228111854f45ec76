"""Checks of a model on the first images of a pool, before hours are spent on it."""

from __future__ import annotations

import numpy as np
from torch import nn

from puma.data.pool import Pool
from puma.data.tensors import read_batch
from puma.errors import DataError
from puma.models import checks
from puma.models.modes import device_of

_IMAGES = 64


def check_model(model: nn.Module, pool: Pool) -> None:
    """Check a model as `puma.models.checks.check_model` does, on the pool's first images.

    Raises:
        ModelError: as told there.
        DataError: an empty pool.
    """
    if not len(pool):
        raise DataError("the pool is empty", why="there is nothing to score")
    images, _ = read_batch(pool, np.arange(min(_IMAGES, len(pool))), device_of(model))
    checks.check_model(model, images, pool.num_classes)

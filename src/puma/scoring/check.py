"""A look at the margin model before hours are spent on it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from puma.attacks.network import require_eval
from puma.data.pool import Pool
from puma.data.tensors import read_batch
from puma.errors import DataError, ModelError

_LOOK = 64
_ALONE = 4
_TOLERANCE = 1e-3


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def check_model(model: nn.Module, pool: Pool) -> None:
    """Run the first images alone and among others, and refuse a model whose answers differ.

    Raises:
        ModelError: training mode; not logits; classes that do not fit the pool; an answer that depends on the other
            images of the batch or changes from call to call.
        DataError: an empty pool.
    """
    require_eval(model)
    if not len(pool):
        raise DataError("the pool is empty", why="there is nothing to score")
    images, _ = read_batch(pool, np.arange(min(_LOOK, len(pool))), device_of(model))
    with torch.no_grad():
        try:
            together = model(images)
        except RuntimeError as error:
            shape = "x".join(map(str, images.shape[1:]))
            raise ModelError(f"the margin model cannot take images {shape}", why=str(error).splitlines()[0]) from error
        if not isinstance(together, torch.Tensor) or together.ndim != 2 or len(together) != len(images):
            got = list(together.shape) if isinstance(together, torch.Tensor) else type(together).__name__
            raise ModelError(f"the model returns {got} for {len(images)} images", why="logits [B, classes] are needed")
        if together.shape[1] < pool.num_classes:
            raise ModelError(
                f"the margin model has {together.shape[1]} classes, the pool {pool.num_classes}",
                fix="score with a model trained on the classes of this pool",
            )
        again = model(images)
        alone = torch.cat([model(images[row : row + 1]) for row in range(min(_ALONE, len(images)))])
    _compare(together, again, "its answer changes from call to call", "is there noise in its forward pass?")
    _compare(together[: len(alone)], alone, "its answer depends on the other images of the batch", "model.eval()?")


def _compare(one: torch.Tensor, two: torch.Tensor, why: str, fix: str) -> None:
    difference = (one.float() - two.float()).abs()
    scale = 1 + one.float().abs().amax()
    if bool((difference > _TOLERANCE * scale).any()):
        raise ModelError(
            f"the model gives different logits for the same image (by {float(difference.max()):.3g})", why=why, fix=fix
        )

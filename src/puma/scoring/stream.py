"""From rows of a pool to rows of a margin table, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from puma.attacks.deepfool import deepfool
from puma.data.pool import Pool
from puma.data.tensors import read_batch
from puma.scoring.health import device_of
from puma.scoring.settings import ScoringSettings

Columns = dict[str, NDArray[Any]]


def score_rows(
    model: nn.Module, pool: Pool, start: int, stop: int, settings: ScoringSettings, done: Callable[[int], None]
) -> Columns:
    """The columns of rows ``start`` to ``stop``; ``done`` is called with the number of images after each batch.

    Batches begin at ``start`` and are all of one size: the last is filled up with its own last image, so that the
    bytes of a part do not depend on how many rows happen to remain.
    """
    device = device_of(model)
    batches = []
    for first in range(start, stop, settings.batch_size):
        rows = np.arange(first, min(first + settings.batch_size, stop))
        full = np.minimum(np.arange(first, first + settings.batch_size), stop - 1) if stop - start > len(rows) else rows
        images, labels = read_batch(pool, full, device)
        hit = deepfool(
            model, images, labels, norm=settings.norm, mode=settings.mode, steps=settings.steps, chunk=settings.chunk
        )
        count = len(rows)
        batches.append(
            {
                "predicted": hit.predicted[:count].cpu().numpy().astype(np.int16),
                "margin": hit.margin[:count].cpu().numpy().astype(np.float32),
                "status": hit.codes[:count].cpu().numpy(),
                "steps": hit.steps[:count].cpu().numpy(),
            }
        )
        done(count)
    columns: Columns = {
        "index": np.arange(start, stop, dtype=np.int64),
        "label": pool.labels[start:stop].astype(np.int16),
    }
    columns |= {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return columns | {"source": pool.source.codes[start:stop]}


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

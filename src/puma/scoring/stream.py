"""From rows of a pool to rows of a margin table, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
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
    batches = []
    for first in range(start, stop, settings.batch_size):
        rows = np.arange(first, min(first + settings.batch_size, stop))
        batches.append(score_batch(model, pool, rows, settings, fill=stop - start > len(rows)))
        done(len(rows))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def score_batch(
    model: nn.Module, pool: Pool, rows: NDArray[np.int64], settings: ScoringSettings, fill: bool = False
) -> Columns:
    """The columns of ``rows``; with ``fill`` the last row is repeated up to the full batch size, and not returned."""
    count = len(rows)
    full = np.pad(rows, (0, settings.batch_size - count), mode="edge") if fill else rows
    images, labels = read_batch(pool, full, device_of(model))
    hit = deepfool(
        model,
        images,
        labels,
        norm=settings.norm,
        mode=settings.mode,
        steps=settings.steps,
        chunk=settings.chunk,
        precision=settings.precision,
        proxy=_compiled(model) if settings.compile else None,
    )
    return {
        "index": rows.astype(np.int64),
        "label": pool.labels[rows].astype(np.int16),
        "predicted": hit.predicted[:count].cpu().numpy().astype(np.int16),
        "margin": hit.margin[:count].cpu().numpy().astype(np.float32),
        "status": hit.codes[:count].cpu().numpy(),
        "steps": hit.steps[:count].cpu().numpy(),
        "source": pool.source.codes[rows],
    }


@lru_cache(maxsize=1)
def _compiled(model: nn.Module) -> nn.Module:
    """The compiled model, made once for a process; shapes are fixed, a batch is filled up to one of a few."""
    proxy: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return proxy


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

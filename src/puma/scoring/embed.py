"""Feature vectors of a pool's images: the input of a network's last linear layer, as resumable ``.npy`` parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma.data.pool import Pool, read_batch
from puma.data.source import Source
from puma.errors import ModelError
from puma.io import Shards, spans
from puma.margins import PART_ROWS
from puma.models.modes import device_of
from puma.models.weights import weights_sha256
from puma.scoring.parts import as_pool, check_model, make_missing, write_array
from puma.strategies.selectors import RECORD


def embed(
    model: nn.Module,
    pool: Pool | Source,
    out: Path | str,
    *,
    batch_size: int = 512,
    part_rows: int = PART_ROWS,
    progress: bool = False,
) -> Path:
    """Write the features of every image to ``out``, as ``part-000000.npy``, ... float32 ``[rows, D]``.

    Finished parts are not made again. The folder is what strategies take as ``features``.

    Args:
        model: a network with a linear layer at its end, in eval mode on its device.
        pool: a `Pool`, or one source.
        out: folder of the parts.
        batch_size: images per pass.
        part_rows: rows of one part.
        progress: show a bar.

    Raises:
        ModelError: the network has no linear layer, is in training mode, or does not fit the pool.
        ResumeError: ``out`` holds the features of another network or pool, or is being written.
    """
    pool = as_pool(pool)
    check_model(model, pool)
    meta = {"model": weights_sha256(model), "pool": pool.fingerprint, "rows": len(pool), "part_rows": part_rows}
    parts = dict(enumerate(spans(len(pool), part_rows)))
    shards = Shards(out, meta, suffix=".npy", record=RECORD, schema="puma.features/1")
    with shards.held(), _last_layer_inputs(model) as inputs:

        @torch.no_grad()
        def features(part: range, done: Callable[[int], None]) -> NDArray[np.float32]:
            batches = []
            for start in range(part.start, part.stop, batch_size):
                rows = np.arange(start, min(start + batch_size, part.stop))
                model(read_batch(pool, rows, device_of(model))[0])
                batches.append(inputs.pop().flatten(1).float().cpu().numpy())
                inputs.clear()
                done(len(rows))
            return np.concatenate(batches)

        make_missing(shards, parts, features, partial(write_array, shards), "features", progress)
    return Path(out)


@contextmanager
def _last_layer_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which each forward pass appends the input of the last linear layer."""
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ModelError("the network has no linear layer", why="its input is what features are taken from")
    inputs: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].detach())

    handle = linear[-1].register_forward_pre_hook(keep)
    try:
        yield inputs
    finally:
        handle.remove()

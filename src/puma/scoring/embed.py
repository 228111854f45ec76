"""Feature vectors of a pool's images: what a network's last linear layer is given. Resumable ``.npy`` parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma.data.pool import Pool
from puma.data.source import Source
from puma.data.tensors import read_batch
from puma.errors import ModelError, ResumeError
from puma.io import atomic_path, lock, read_json, settings_diff, sha256_file, write_json
from puma.margins import PART_ROWS
from puma.models.modes import device_of
from puma.models.weights import weights_sha256
from puma.progress import Progress
from puma.scoring.parts import as_pool, check_model
from puma.strategies.features import RECORD


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

    Finished parts whose SHA-256 is that of the record (``features.json``) are not made again. The folder is what the
    strategies ``dedup`` and ``dynamic-uncertainty`` take as ``features``.

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
    whole, folder = as_pool(pool), Path(out)
    check_model(model, whole)
    meta = {"model": weights_sha256(model), "pool": whole.describe()["fingerprint"], "part_rows": part_rows}
    with lock(folder):
        record = folder / RECORD
        known = read_json(record) if record.exists() else dict(meta)
        digests = known.pop("parts", {})
        if changed := settings_diff(known, meta):
            raise ResumeError(
                f"{folder} holds other features", why="; ".join(changed), fix="choose another output folder"
            )
        write_json(record, meta | {"parts": digests})
        starts = range(0, len(whole), part_rows)
        with Progress("features", len(whole), "images", show=progress) as bar, _watched(model) as seen:
            for part, start in enumerate(starts):
                rows = min(part_rows, len(whole) - start)
                path = folder / f"part-{part:06d}.npy"
                if not _whole_part(path, rows, digests.get(path.name)):
                    with atomic_path(path) as temporary:
                        with temporary.open("wb") as file:
                            np.save(file, _features(model, whole, start, start + rows, batch_size, seen))
                        # before the part appears: killed in between, a part never lies there without its digest
                        digests[path.name] = sha256_file(temporary)
                        write_json(record, meta | {"parts": digests})
                elif path.name not in digests:  # of a version that kept no digests
                    digests[path.name] = sha256_file(path)
                    write_json(record, meta | {"parts": digests})
                bar.advance(rows)
    return folder


def _features(
    model: nn.Module, pool: Pool, start: int, stop: int, batch_size: int, seen: list[Tensor]
) -> NDArray[np.float32]:
    parts = []
    for first in range(start, stop, batch_size):
        images, _ = read_batch(pool, np.arange(first, min(first + batch_size, stop)), device_of(model))
        with torch.no_grad():
            model(images)
        parts.append(seen.pop().flatten(1).float().cpu().numpy())
        seen.clear()
    return np.concatenate(parts)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the last linear layer is given, at each pass."""
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ModelError("the network has no linear layer", why="its input is what features are taken from")
    seen: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].detach())

    handle = linear[-1].register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _whole_part(path: Path, rows: int, digest: str | None) -> bool:
    try:
        whole = len(np.load(path, mmap_mode="r", allow_pickle=False)) == rows
        return whole and digest in (None, sha256_file(path))
    except (OSError, ValueError, EOFError):
        return False

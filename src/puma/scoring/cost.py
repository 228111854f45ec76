"""What scoring a pool will cost, from a few seconds of measurement."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn

from puma.data.pool import Pool
from puma.margins import Columns, part_size
from puma.models.modes import device_of
from puma.scoring.parts import TableParts
from puma.scoring.score import ScoringSettings, score_rows
from puma.scoring.snapshots import SnapshotSettings
from puma.scoring.snapshots import score_rows as score_snapshot_rows

_SECONDS = 5.0
_BATCHES = 8
_FIRST, _GROWTH = 8, 8


@dataclass(frozen=True)
class Estimate:
    """The cost of a table.

    Args:
        images: rows still to score.
        finished: rows in parts that are there already.
        images_per_s: of one worker, measured.
        seconds: until the last worker is done.
        disk_bytes: of the parts still to write.
        disk_free: on the file system of the output folder; None without a folder.
        memory_bytes: peak of one worker: resident memory, or the GPU's.
        measured: images that were scored to find out.
        full_batch: a batch of full size was among them; if not, ``memory_bytes`` is a lower bound.
    """

    images: int
    finished: int
    images_per_s: float
    seconds: float
    disk_bytes: int
    disk_free: int | None
    memory_bytes: int
    measured: int
    full_batch: bool


def estimate(
    model: nn.Module, pool: Pool, settings: ScoringSettings, out: Path | None = None, num_workers: int = 1
) -> Estimate:
    """Score a handful of images twice and then, for some seconds, growing batches from all over the pool.

    Args:
        model: the margin model.
        pool: the pool; rows all over it are taken, since it may be sorted by class.
        settings: of the table.
        out: its folder; not made if it does not exist.
        num_workers: processes that will share the work.
    """
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    most = min(settings.batch_size, len(pool))
    # compiled graphs come in sizes up to one pass: the first batch has to make them all
    size = min(settings.chunk if settings.compile else _FIRST, most)
    batches: list[tuple[int, float]] = []
    scored: list[Columns] = []
    began = perf_counter()
    while len(batches) < _BATCHES:
        before = perf_counter()
        if len(batches) == 1:  # the first pays for allocations and for choosing kernels, and is not counted
            began = before
        rows = (np.arange(size) * len(pool) // size + len(batches) * len(pool) // (size * _BATCHES)) % len(pool)
        scored.append(score_rows(model, pool, rows, settings))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = perf_counter()
        batches.append((size, now - before))
        if len(batches) > 1:
            affordable = int((_SECONDS - (now - began)) / (now - before) * size)
            if affordable < size:
                break
            size = min(affordable, size * _GROWTH, most)
    largest = max(size for size, _ in batches[1:])
    counted = [(size, spent) for size, spent in batches[1:] if 2 * size >= largest]  # small ones leave a GPU idle
    rate = sum(size for size, _ in counted) / sum(spent for _, spent in counted)
    meta = settings.meta(model, pool)
    finished = 0
    if out is not None and out.is_dir():
        parts = TableParts(out, meta, device, write=False)
        finished = sum(len(rows) for number, rows in enumerate(parts.ranges) if parts.finished(number))
    columns = {name: np.concatenate([part[name] for part in scored]) for name in scored[0]}
    left = len(pool) - finished
    return Estimate(
        images=left,
        finished=finished,
        images_per_s=rate,
        seconds=left / (rate * num_workers),
        disk_bytes=round(part_size(columns, meta) / len(columns["index"]) * left),
        disk_free=None if out is None else _free(out),
        memory_bytes=_peak_memory(device),
        measured=sum(size for size, _ in batches),
        full_batch=max(size for size, _ in batches) == most,
    )


def estimate_snapshots(
    models: Sequence[nn.Module], pool: Pool, settings: SnapshotSettings, out: Path | None = None, num_workers: int = 1
) -> Estimate:
    """The same for scores over ``models``, the snapshots of a run: growing batches of the pool's first images."""
    device, wanted = device_of(models[-1]), len(pool)
    if settings.rows == "real":
        wanted = int((~pool.synthetic).sum())
    most, size, spent, measured = min(settings.batch_size, wanted), 2, 0.0, 0
    while True:
        size, began = min(size, most), perf_counter()
        columns = score_snapshot_rows(models, pool, range(size), settings, lambda _: None)
        spent, measured = perf_counter() - began, measured + size
        if measured > size and (size == most or 4 * spent > _SECONDS):
            break
        size *= 4
    meta, finished = settings.meta(models, pool), 0
    if out is not None and out.is_dir():
        parts = TableParts(out, meta, device, write=False)
        finished = sum(len(rows) for number, rows in enumerate(parts.ranges) if parts.finished(number))
    left = len(pool) - finished
    return Estimate(
        images=left,
        finished=finished,
        images_per_s=size / spent,
        seconds=left * wanted / len(pool) * spent / (size * num_workers),
        disk_bytes=round(part_size(columns, meta) / size * left),
        disk_free=None if out is None else _free(out),
        memory_bytes=_peak_memory(device),
        measured=measured,
        full_batch=size == most,
    )


def _free(out: Path) -> int:
    """Free bytes where ``out`` is or will be."""
    return shutil.disk_usage(
        next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    ).free


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

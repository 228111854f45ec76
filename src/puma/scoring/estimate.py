"""What scoring will cost, from a short measured probe."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from puma.data.pool import Pool
from puma.margins import part_size
from puma.scoring.health import device_of
from puma.scoring.parts import PartFolder
from puma.scoring.settings import ScoringSettings, environment
from puma.scoring.stream import score_batch, synchronise

_PROBE_S = 10.0
_PROBE_BATCHES = 8


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
        probed: images that were scored to find out.
    """

    images: int
    finished: int
    images_per_s: float
    seconds: float
    disk_bytes: int
    disk_free: int | None
    memory_bytes: int
    probed: int


def estimate(
    model: nn.Module,
    pool: Pool,
    settings: ScoringSettings,
    meta: dict[str, Any],
    out: Path | None = None,
    num_workers: int = 1,
) -> Estimate:
    """Score a few batches spread over the pool, for ten seconds at most beyond the first, and extrapolate."""
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    size = min(settings.batch_size, len(pool))
    starts = np.unique(np.linspace(0, len(pool) - size, _PROBE_BATCHES).astype(int))
    began = time.perf_counter()
    spent: list[float] = []
    rows: list[dict[str, Any]] = []
    for start in starts:
        before = time.perf_counter()
        rows.append(score_batch(model, pool, np.arange(start, start + size), settings))
        synchronise(device)
        spent.append(time.perf_counter() - before)
        if time.perf_counter() - began > _PROBE_S:
            break
    steady = spent[1:] or spent  # the first batch pays for allocations and for choosing kernels
    rate = size * len(steady) / sum(steady)
    columns = {name: np.concatenate([batch[name] for batch in rows]) for name in rows[0]}
    done = _finished(out, meta) if out else 0
    left = len(pool) - done
    per_row = part_size(columns, meta) / len(columns["index"])
    return Estimate(
        images=left,
        finished=done,
        images_per_s=rate,
        seconds=left / (rate * num_workers),
        disk_bytes=round(per_row * left),
        disk_free=_free(out) if out else None,
        memory_bytes=_peak_memory(device),
        probed=size * len(spent),
    )


def _finished(out: Path, meta: dict[str, Any]) -> int:
    """Rows of the parts that are there; a folder that does not exist is not made for an estimate."""
    if not out.is_dir():
        return 0
    folder = PartFolder(out, meta, environment(torch.device("cpu")), create=False)
    return sum(
        stop - start for start, stop in (folder.bounds(part) for part in range(folder.count) if folder.finished(part))
    )


def _free(out: Path) -> int:
    """Free bytes where ``out`` is or will be."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(place).free


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

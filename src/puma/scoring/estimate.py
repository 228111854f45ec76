"""What scoring will cost, from a short measured probe."""

from __future__ import annotations

import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from puma.data.pool import Pool
from puma.margins import part_size
from puma.scoring.health import device_of
from puma.scoring.parts import PartFolder
from puma.scoring.settings import ScoringSettings, environment
from puma.scoring.stream import score_batch, synchronise

_PROBE_S = 5.0
_PROBES = 8
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
        probed: images that were scored to find out.
        whole_batch: a batch of full size was among them; if not, ``memory_bytes`` is a lower bound.
    """

    images: int
    finished: int
    images_per_s: float
    seconds: float
    disk_bytes: int
    disk_free: int | None
    memory_bytes: int
    probed: int
    whole_batch: bool


def estimate(
    model: nn.Module,
    pool: Pool,
    settings: ScoringSettings,
    meta: dict[str, Any],
    out: Path | None = None,
    num_workers: int = 1,
) -> Estimate:
    """Score a handful of images twice and then, for some seconds, growing numbers from all over the pool."""
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    most = min(settings.batch_size, len(pool))
    # compiled graphs come in sizes up to one pass: the first probe has to make them all
    size = min(settings.chunk if settings.compile else _FIRST, most)
    probes: list[tuple[int, float]] = []
    began = 0.0
    rows: list[dict[str, Any]] = []
    while len(probes) < _PROBES:
        before = perf_counter()
        if len(probes) == 1:  # the first pays for allocations and for choosing kernels, and is not counted
            began = before
        rows.append(score_batch(model, pool, _spread(len(pool), size, len(probes)), settings))
        synchronise(device)
        now = perf_counter()
        probes.append((size, now - before))
        if len(probes) > 1:
            affordable = int((_PROBE_S - (now - began)) / (now - before) * size)
            if affordable < size:
                break
            size = min(affordable, size * _GROWTH, most)
    rate = _rate(probes)
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
        probed=sum(count for count, _ in probes),
        whole_batch=max(count for count, _ in probes) == most,
    )


def _spread(rows: int, size: int, probe: int) -> NDArray[np.int64]:
    """``size`` rows all over a pool, which may be sorted by class; others for every probe."""
    return (np.arange(size) * rows // size + probe * rows // (size * _PROBES)) % rows


def _rate(probes: list[tuple[int, float]]) -> float:
    """Images per second in the largest probes but the first: small ones leave a GPU idle."""
    counted = probes[1:]
    largest = max(size for size, _ in counted)
    counted = [(size, spent) for size, spent in counted if 2 * size >= largest]
    return sum(size for size, _ in counted) / sum(spent for _, spent in counted)


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

"""A table to be scored, named by text, so that other processes and machines can make its parts; and what it costs."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.devices import resolve_device, warn_slow_bf16
from puma.errors import ModelError
from puma.io import temporary_path
from puma.margins import MarginTable, part_size
from puma.models.checks import device_of
from puma.models.zoo import resolve_model
from puma.progress import Progress
from puma.scoring.labels import LabelSettings
from puma.scoring.parts import Rows, TableParts, checked_pool
from puma.scoring.score import ScoringSettings
from puma.scoring.snapshots import SnapshotSettings, load_snapshots
from puma.tasks import Workers, require_shared, run_tasks


@dataclass(frozen=True)
class ScoringJob:
    """What to score, with what, into which folder."""

    model: str  # as in `puma.models.zoo.resolve_model`; for scores over the snapshots of a run: the run folder
    sources: tuple[str, ...]  # specs of `puma.load_dataset`, in the order of the pool
    out: str  # folder of the table
    settings: ScoringSettings | SnapshotSettings
    weights: str | None = None  # safetensors file for a factory
    roles: tuple[str, ...] | None = None  # as in `Pool`
    device: str = "auto"

    def load(self) -> tuple[list[nn.Module], Pool]:
        """The margin model, or the snapshots, in eval mode on its device, and the pool; checked against each other."""
        pool = open_pool(self.sources, self.roles)
        if isinstance(self.settings, SnapshotSettings):
            models = load_snapshots(self.model)
        else:
            models = [resolve_model(self.model, self.weights).eval()]
            warn_slow_bf16(self.settings.precision, resolve_device(self.device))
        models = [model.to(resolve_device(self.device)) for model in models]
        return models, checked_pool(models[-1], pool)

    def make(
        self, worker: int = 0, num_workers: int = 1, workers: Workers | None = None, progress: bool = False
    ) -> MarginTable | None:
        """Make the parts that are not finished; return the table, or None while parts of other workers are missing.

        This process is ``worker`` of ``num_workers`` started from outside that share the folder, and makes every
        ``num_workers``-th part; ``workers`` are processes of this machine, or a Ray cluster, to hand these out to.
        `BusyError` if a live process is this worker, or divides the parts among another number of workers.
        """
        parts = TableParts(self.out, self.settings, *self.load())
        numbers = range(worker, len(parts.ranges), num_workers)
        with parts.held(worker, num_workers):
            if workers is None or (workers.count == 1 and workers.ray is None):
                parts.make(numbers, progress)
            else:
                self._hand_out(parts, parts.missing(numbers), workers, progress)
        finished = num_workers == 1 or not parts.missing(range(len(parts.ranges)))
        return MarginTable.read(self.out) if finished else None

    def _hand_out(self, parts: TableParts, missing: list[int], workers: Workers, progress: bool) -> None:
        """One task for each missing part; the mark tells other machines whether they see the same folder."""
        mark = temporary_path(parts.folder / "seen")
        mark.touch()
        task = partial(score_part, self, parts.meta["model"]["sha256"], mark)
        rows, left = sum(map(len, parts.ranges)), sum(len(parts.ranges[number]) for number in missing)
        try:
            with Progress("scores", rows, "images", show=progress, done=rows - left) as bar:
                for number, _ in run_tasks(task, missing, workers):
                    bar.advance(len(parts.ranges[number]))
        finally:
            mark.unlink(missing_ok=True)


def score_part(job: ScoringJob, sha256: str, mark: Path, number: int) -> None:
    """The task of a process: make one part unless it is there; `StorageError` if this machine has another folder."""
    require_shared(mark, job.out)
    _open(job, sha256).make([number])


@lru_cache(maxsize=1)
def _open(job: ScoringJob, sha256: str) -> TableParts:
    """The table, opened once in each process; `ModelError` if the model has other weights than where scoring began."""
    models, pool = job.load()
    if (digest := job.settings.meta(models, pool)["model"]["sha256"]) != sha256:
        what = f"{job.model} has other weights here ({digest[:12]}) than where scoring began ({sha256[:12]})"
        why = "a factory that draws its weights at random, or another file at that path"
        raise ModelError(what, why=why, fix="give --weights, and a path that is the same file on every machine")
    return TableParts(job.out, job.settings, models, pool)


def open_pool(sources: tuple[str, ...], roles: tuple[str, ...] | None = None) -> Pool:
    """The pool of sources named by their specs."""
    return Pool([load_dataset(source) for source in sources], roles=roles)


# --- cost ----------------------------------------------------------------------------------------------------------

_SECONDS, _BATCHES, _FIRST, _GROWTH = 5.0, 8, 8, 8


@dataclass(frozen=True)
class Estimate:
    """The cost of a table: rows still to score and in finished parts, speed and memory of one worker, time of all.

    ``memory_bytes`` is the peak of resident memory, or of the GPU's: a lower bound unless ``full_batch``, a batch of
    full size, was among the ``measured`` images. ``disk_free`` is None without a folder.
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
    models: Sequence[nn.Module],
    pool: Pool,
    settings: ScoringSettings | SnapshotSettings | LabelSettings,
    out: Path | None = None,
    num_workers: int = 1,
) -> Estimate:
    """Score a handful of images twice and then, for some seconds, growing batches from all over the pool.

    ``models`` are the margin model alone, or the snapshots; ``out`` is the table's folder, in which nothing is written.
    """
    device = device_of(models[-1])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # the rows that take time, from all over the pool, since it may be sorted by class
    real_only = isinstance(settings, SnapshotSettings) and settings.rows == "real"
    wanted: Rows = np.flatnonzero(~pool.synthetic) if real_only else range(len(pool))
    most = min(settings.batch_size, len(wanted))
    # compiled graphs come in sizes up to one pass: the first batch has to make them all
    size = min(settings.chunk if isinstance(settings, ScoringSettings) and settings.compile else _FIRST, most)
    batches: list[tuple[int, float]] = []
    for number in range(_BATCHES):
        rows = (np.arange(size) * len(wanted) // size + number * len(wanted) // (size * _BATCHES)) % len(wanted)
        began = perf_counter()
        columns = settings.score_rows(models, pool, np.array([wanted[row] for row in rows]), lambda _: None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        batches.append((size, perf_counter() - began))
        if number:  # the first pays for allocations and for choosing kernels, and is not counted
            left = _SECONDS - sum(spent for _, spent in batches[1:])
            if (affordable := int(left / batches[-1][1] * size)) < size:
                break
            size = min(affordable, size * _GROWTH, most)
    largest = batches[-1][0]
    counted = [(size, spent) for size, spent in batches[1:] if 2 * size >= largest]  # small ones leave a GPU idle
    rate = sum(size for size, _ in counted) / sum(spent for _, spent in counted) * len(pool) / len(wanted)
    images, free = len(pool), None
    if out is not None:
        free = shutil.disk_usage(next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())).free
        if out.is_dir():
            parts = TableParts(out, settings, models, pool, write=False)
            images = sum(len(parts.ranges[number]) for number in parts.missing(range(len(parts.ranges))))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Estimate(
        images=images,
        finished=len(pool) - images,
        images_per_s=rate,
        seconds=images / (rate * num_workers),
        disk_bytes=round(part_size(columns, settings.meta(models, pool)) / len(columns["index"]) * images),
        disk_free=free,
        memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory,
        measured=sum(size for size, _ in batches),
        full_batch=largest == most,
    )

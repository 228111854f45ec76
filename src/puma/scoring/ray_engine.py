"""Scoring on a Ray cluster: one task for each part, so that the load balances itself and machines may come and go.

This module only says what a task is (`puma.cluster` has the rest). The parts and their bytes are those of one process.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from puma.cluster import Cluster, require_shared
from puma.data.pool import Pool
from puma.margins import MarginTable
from puma.progress import Progress
from puma.scoring.health import check_model, device_of
from puma.scoring.job import ScoringJob
from puma.scoring.parts import PartFolder
from puma.scoring.score import score_parts
from puma.scoring.settings import ScoringSettings, environment

_RETRIES = 5


def score_on_ray(
    job: ScoringJob,
    settings: ScoringSettings,
    out: Path | str,
    *,
    address: str | None = None,
    gpus: bool = False,
    progress: bool = False,
) -> MarginTable:
    """Score a pool with one Ray task for each part that is not finished.

    Args:
        job: model and pool; every machine must be able to open them.
        settings: as for `score_margins`.
        out: a folder that every machine sees under the same path.
        address: of a running cluster (``"auto"``, ``"host:6379"``); None starts one on this machine for the time.
        gpus: give each task one GPU.
        progress: show a bar.

    Raises:
        UsageError: Ray is not installed.
        StorageError: a worker does not see the folder.
        ResumeError, ModelError, DataError: as `score_margins`.
    """
    cluster = Cluster(address)
    out = Path(out).absolute()
    model, pool = job.open()
    check_model(model, pool)
    meta = settings.meta(model, pool)
    folder = PartFolder(out, meta, environment(device_of(model)))
    del model
    with folder.held(0, 1), cluster:
        mark = folder.folder / f".seen-{uuid4().hex}"
        mark.touch()
        try:
            _run(cluster, job, settings, folder, mark, gpus, progress)
        finally:
            mark.unlink(missing_ok=True)
    return MarginTable.read(out)


def _run(
    cluster: Cluster,
    job: ScoringJob,
    settings: ScoringSettings,
    folder: PartFolder,
    mark: Path,
    gpus: bool,
    progress: bool,
) -> None:
    """Hand out the missing parts and wait for them."""
    hand_out = cluster.task(score_part, cpus=1, gpus=1 if gpus else 0, retries=_RETRIES)
    missing = [part for part in range(folder.count) if not folder.finished(part)]
    threads = torch.get_num_threads()
    sizes = {part: folder.bounds(part)[1] - folder.bounds(part)[0] for part in range(folder.count)}
    ready = folder.rows - sum(sizes[part] for part in missing)
    with Progress("margins (Ray)", folder.rows, "images", show=progress, done=ready) as bar:
        tasks = [hand_out(job, settings, str(folder.folder), folder.meta, str(mark), threads, part) for part in missing]
        for _, part in cluster.results(tasks):
            bar.advance(sizes[part])


def score_part(
    job: ScoringJob,
    settings: ScoringSettings,
    out: str,
    meta: dict[str, Any],
    mark: str,
    threads: int,
    part: int,
) -> int:
    """The task: make one part unless it is there. Runs on any machine of the cluster; returns the part.

    Raises:
        StorageError: this machine does not see the folder.
    """
    require_shared(Path(mark), out)
    torch.set_num_threads(threads)
    model, pool = _open(job, meta["model"]["sha256"])
    folder = PartFolder(out, meta, environment(device_of(model)))
    score_parts(model, pool, folder, settings, [part])
    return part


@lru_cache(maxsize=1)
def _open(job: ScoringJob, sha256: str) -> tuple[nn.Module, Pool]:
    """Model and pool, opened once in each worker process."""
    return job.open_same(sha256)

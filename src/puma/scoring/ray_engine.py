"""Scoring on a Ray cluster: one task for each part, so that the load balances itself and machines may come and go.

Ray starts the tasks, retries those whose worker died, and lets machines join or leave; this module only says what a
task is. The parts and their bytes are those of a single process.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from puma.data.pool import Pool
from puma.errors import PumaError, StorageError, UsageError
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
    ray = _ray()
    out = Path(out).absolute()
    model, pool = job.open()
    check_model(model, pool)
    meta = settings.meta(model, pool)
    folder = PartFolder(out, meta, environment(device_of(model)))
    del model
    with folder.held(0, 1), _cluster(ray, address):
        mark = folder.folder / f".seen-{uuid4().hex}"
        mark.touch()
        try:
            _run(ray, job, settings, folder, mark, gpus, progress)
        finally:
            mark.unlink(missing_ok=True)
    return MarginTable.read(out)


def _run(
    ray: Any, job: ScoringJob, settings: ScoringSettings, folder: PartFolder, mark: Path, gpus: bool, progress: bool
) -> None:
    """Hand out the missing parts and wait for them."""
    task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=_RETRIES)(score_part)
    missing = [part for part in range(folder.count) if not folder.finished(part)]
    threads = torch.get_num_threads()
    sizes = {part: folder.bounds(part)[1] - folder.bounds(part)[0] for part in range(folder.count)}
    ready = folder.rows - sum(sizes[part] for part in missing)
    with Progress("margins (Ray)", folder.rows, "images", show=progress, done=ready) as bar:
        pending = {
            task.remote(job, settings, str(folder.folder), folder.meta, str(mark), threads, part): part
            for part in missing
        }
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            for reference in done:
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    for other in pending:
                        ray.cancel(other)
                    raise _cause(error) from error
                bar.advance(sizes[pending.pop(reference)])


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
    if not Path(mark).exists():
        raise StorageError(
            f"{out} on {os.uname().nodename} is not the folder where scoring was started",
            why="the workers of a cluster write into one common folder",
            fix="choose --out on storage that every machine mounts at the same path",
        )
    torch.set_num_threads(threads)
    model, pool = _open(job, meta["model"]["sha256"])
    folder = PartFolder(out, meta, environment(device_of(model)))
    score_parts(model, pool, folder, settings, [part])
    return part


@lru_cache(maxsize=1)
def _open(job: ScoringJob, sha256: str) -> tuple[nn.Module, Pool]:
    """Model and pool, opened once in each worker process."""
    return job.open_same(sha256)


class _cluster:
    """The cluster at an address, or one of this machine's own that ends with the work."""

    def __init__(self, ray: Any, address: str | None) -> None:
        self.ray, self.address = ray, address
        self.ours = not ray.is_initialized()

    def __enter__(self) -> None:
        if not self.ours:
            return
        paths = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
        try:
            self.ray.init(
                address=self.address,
                log_to_driver=False,
                include_dashboard=False if self.address is None else None,
                runtime_env={"env_vars": {"PYTHONPATH": paths}},
            )
        except (ConnectionError, ValueError) as error:
            raise UsageError(
                f"no Ray cluster at {self.address!r}",
                why=str(error).splitlines()[0],
                fix="`ray start --head` starts one",
            ) from error

    def __exit__(self, *_: object) -> None:
        if self.ours:
            self.ray.shutdown()


def _cause(error: Any) -> BaseException:
    """The task's own error: a user's mistake keeps its text and exit code."""
    cause = error.cause
    return cause if isinstance(cause, PumaError) else error


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError("Ray is not installed", fix='pip install "puma-robust[ray]"') from None
    return ray

"""A table to be scored, named by text, so that another process or machine can open the same model and pool."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.devices import resolve_device, warn_slow_bf16
from puma.errors import ModelError
from puma.io import temporary_path
from puma.margins import MarginTable
from puma.models.modes import device_of
from puma.models.weights import weights_sha256
from puma.models.zoo import resolve_model
from puma.progress import Progress
from puma.scoring.parts import Compute, TableParts, check_model
from puma.scoring.score import ScoringSettings, margin_parts
from puma.scoring.snapshots import SnapshotSettings, load_snapshots, snapshot_parts
from puma.tasks import Workers, require_shared, run_tasks


@dataclass(frozen=True)
class ScoringJob:
    """What to score, with what, into which folder.

    Args:
        model: a weights file, a run folder, or ``"package.module:factory"``; see `puma.models.zoo.resolve_model`.
            For scores over the snapshots of a run: the run folder.
        sources: specs of `puma.load_dataset`, in the order of the pool.
        out: folder of the table.
        settings: of a margin table, or of scores over snapshots.
        weights: safetensors file for a factory.
        roles: ``"real"`` or ``"synthetic"`` for each source; None as in `Pool`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; ``"auto"`` takes a GPU if there is one.
        threads: of the processor; 0 leaves it to torch.
    """

    model: str
    sources: tuple[str, ...]
    out: str
    settings: ScoringSettings | SnapshotSettings
    weights: str | None = None
    roles: tuple[str, ...] | None = None
    device: str = "auto"
    threads: int = 0

    def load(self) -> tuple[nn.Module, Pool]:
        """The margin model, in eval mode on its device, and the pool; checked against each other."""
        if self.threads:
            torch.set_num_threads(self.threads)
        pool = open_pool(self.sources, self.roles)
        model = open_model(self.model, self.weights, self.device)
        check_model(model, pool)
        warn_slow_bf16(getattr(self.settings, "precision", "float32"), device_of(model))
        return model, pool

    def open(self) -> tuple[TableParts, Compute]:
        """Load the model and the pool, and claim the folder of the table.

        Raises:
            UsageError: a device that does not exist.
            ModelError: a model that cannot be built, or does not fit the pool.
            DataError: a source that cannot be read.
            ResumeError: the folder holds another table.
        """
        if isinstance(self.settings, ScoringSettings):
            return margin_parts(*self.load(), self.settings, self.out)
        if self.threads:
            torch.set_num_threads(self.threads)
        models = [model.to(resolve_device(self.device)) for model in load_snapshots(self.model)]
        return snapshot_parts(models, open_pool(self.sources, self.roles), self.settings, self.out)

    def make(
        self, worker: int = 0, num_workers: int = 1, workers: Workers | None = None, progress: bool = False
    ) -> MarginTable | None:
        """Make the parts that are not finished; return the table, or None while parts of other workers are missing.

        Args:
            worker: number of this process among those started from outside that share the folder.
            num_workers: how many there are; each makes every ``num_workers``-th part.
            workers: processes of this machine, or a Ray cluster, to hand out the parts to; None: this process.
            progress: show a bar.

        Raises:
            UsageError: Ray is not installed, or there is no cluster at the address.
            BusyError: a live process is this worker, or divides the parts among another number of workers.
            StorageError: the disk is full (finished parts are intact), or a machine does not see the folder.
            WorkerLost: a process was killed; finished parts are intact.
        """
        parts, compute = self.open()
        numbers = range(worker, len(parts.ranges), num_workers)
        with parts.held(worker, num_workers):
            if workers is None or (workers.count == 1 and workers.ray is None):
                parts.make(numbers, compute, progress)
            else:
                self._hand_out(parts, parts.missing(numbers), workers, progress)
        return MarginTable.read(self.out) if num_workers == 1 or parts.all_finished() else None

    def _hand_out(self, parts: TableParts, missing: list[int], workers: Workers, progress: bool) -> None:
        """One task for each missing part; the mark tells other machines whether they see the same folder."""
        mark = temporary_path(parts.folder / "seen")
        mark.touch()
        task = partial(score_part, self, parts.meta["model"]["sha256"], mark)
        rows, left = sum(map(len, parts.ranges)), sum(len(parts.ranges[number]) for number in missing)
        try:
            with Progress("scores", rows, "images", show=progress, done=rows - left) as bar:
                for number, _ in run_tasks(task, missing, replace(workers, threads=self.threads or workers.threads)):
                    bar.advance(len(parts.ranges[number]))
        finally:
            mark.unlink(missing_ok=True)


def score_part(job: ScoringJob, sha256: str, mark: Path, number: int) -> None:
    """The task of a process: make one part unless it is there.

    Raises:
        StorageError: this machine does not see the folder.
        ModelError: the model has other weights here than where scoring began.
    """
    require_shared(mark, job.out)
    parts, compute = _open(job, sha256)
    parts.make([number], compute)


@lru_cache(maxsize=1)
def _open(job: ScoringJob, sha256: str) -> tuple[TableParts, Compute]:
    """Model, pool and folder, opened once in each process."""
    if isinstance(job.settings, ScoringSettings):
        model, pool = job.load()
        if (digest := weights_sha256(model)) != sha256:
            raise ModelError(
                f"{job.model} has other weights here ({digest[:12]}) than where scoring began ({sha256[:12]})",
                why="a factory that draws its weights at random, or another file at that path",
                fix="give --weights, and a path that is the same file on every machine",
            )
        return margin_parts(model, pool, job.settings, job.out)
    return job.open()


def open_model(model: str, weights: str | None = None, device: str = "auto") -> nn.Module:
    """The model that a spec names, in eval mode on its device."""
    return resolve_model(model, weights).eval().to(resolve_device(device))


def open_pool(sources: tuple[str, ...], roles: tuple[str, ...] | None = None) -> Pool:
    """The pool of sources named by their specs."""
    return Pool([load_dataset(source) for source in sources], roles=roles)

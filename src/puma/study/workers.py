"""Several local processes on one study, and one place where a person sees how far they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress

import torch

from puma.errors import PumaError
from puma.progress import LOG_EVERY_ENV, Progress
from puma.study.budget import Budget
from puma.study.folder import StudyFolder
from puma.study.status import StudyStatus

_POLL_S = 0.5
_GRACE_S = 30.0
_VISIBLE_ENV = "CUDA_VISIBLE_DEVICES"


class WorkerFailed(PumaError):
    """A worker ended with an error; its last lines are the message and its exit code is ours."""

    def __init__(self, lines: list[str], code: int) -> None:
        super().__init__("\n".join(lines) or f"a worker ended with exit code {code}")
        self.exit_code = code


class _Worker:
    """One ``puma study run FOLDER --join`` and the last lines it wrote."""

    def __init__(self, study: StudyFolder, threads: int, gpu: str | None) -> None:
        command = [sys.executable, "-m", "puma", "study", "run", str(study.path), "--join"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), LOG_EVERY_ENV: "1"}
        if gpu is not None:
            environment[_VISIBLE_ENV] = gpu
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.lines: deque[str] = deque(maxlen=40)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    @property
    def latest(self) -> str:
        return self.lines[-1] if self.lines else ""


def run_workers(study: StudyFolder, *, jobs: int, budget: Budget | None = None, show: bool = True) -> bool:
    """Run a study with ``jobs`` processes on this machine.

    Args:
        study: the study.
        jobs: processes; each gets an equal share of the cores as threads, and one of the GPUs where there are several.
        budget: when the workers are told to checkpoint and stop.
        show: draw progress.

    Returns:
        True if the study is finished, False if the time budget ended it.

    Raises:
        WorkerFailed: a worker ended with an error; the others are stopped, what was finished is kept.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    gpus = visible_gpus()
    several = len(gpus) > 1  # one or none: every worker finds it by itself
    workers = [_Worker(study, threads, gpus[i % len(gpus)] if several else None) for i in range(jobs)]
    budget = budget or Budget()
    status = StudyStatus(study, jobs)
    try:
        with Progress(f"study {study.spec.name}", status.total, "%", show=show) as bar:
            while any(worker.process.poll() is None for worker in workers):
                if any(worker.process.poll() not in (None, 0) for worker in workers):
                    break
                if budget.spent:
                    return False
                bar.update(status.done(), status.summary(), [worker.latest for worker in workers])
                time.sleep(_POLL_S)
            bar.update(status.done(), status.summary(), [])
    finally:
        _stop(workers)
    failed = next((worker for worker in workers if worker.process.returncode not in (0, -signal.SIGTERM, 143)), None)
    if failed is not None:
        raise WorkerFailed(_told(list(failed.lines)), failed.process.returncode)
    return True


def _told(lines: list[str]) -> list[str]:
    """What a worker said of its error: from there on; all its last lines where it did not get to say it."""
    start = next((place for place, line in enumerate(lines) if line.startswith("error: ")), 0)
    return [line.removeprefix("error: ") for line in lines[start:]]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them: numbers, UUIDs."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(_VISIBLE_ENV, "").split(",") if name.strip()]
    return named[:count] or [str(number) for number in range(count)]


def _stop(workers: list[_Worker]) -> None:
    """Ask the workers that still run to checkpoint and end, and wait for them."""
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.send_signal(signal.SIGTERM)
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(_GRACE_S)
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()

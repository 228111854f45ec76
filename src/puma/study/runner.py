"""The tasks of a study, and working through them: in one process, in several, or on Ray.

Any number of processes may share a study's folder. A task reads what earlier tasks left there. It is held by a lock
while it runs; a process that dies in any way gives up its lock, and another one goes on from its last checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puma._version import __version__
from puma.errors import BusyError
from puma.io import lock
from puma.progress import Progress
from puma.study.folder import StudyFolder
from puma.study.status import StudyStatus, eps_warnings
from puma.study.tasks import Task, study_tasks
from puma.tasks import Workers, require_shared, run_tasks

logger = logging.getLogger("puma")
_WAIT_S = 0.5


class Budget:
    """Time until which work may go on.

    Args:
        until: seconds since the epoch, a clock that all machines share; None for ever.

    >>> Budget(0.0).spent, Budget().spent
    (True, False)
    """

    def __init__(self, until: float | None = None) -> None:
        self.until = until
        self._stopped = False

    @classmethod
    def of(cls, seconds: float | None) -> Budget:
        """A budget of so many seconds from now; None for no end."""
        return cls(None if seconds is None else time.time() + seconds)

    @property
    def spent(self) -> bool:
        """Whether the time is over."""
        return self._stopped or (self.until is not None and time.time() >= self.until)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop the work inside when the time is over, and go on behind it; for the main thread only.

        Training answers SIGTERM with a checkpoint, the other engines keep what they have finished; both then end the
        process with SystemExit, which ends here if the budget was the reason.
        """
        if self.until is None:
            yield
            return
        before = signal.signal(signal.SIGTERM, _terminated)
        timer = threading.Timer(max(self.until - time.time(), 0), self._stop)
        timer.daemon = True
        timer.start()
        try:
            yield
        except SystemExit:
            if not self._stopped:  # somebody else's SIGTERM
                raise
        finally:
            timer.cancel()
            signal.signal(signal.SIGTERM, before)

    def _stop(self) -> None:
        self._stopped = True
        os.kill(os.getpid(), signal.SIGTERM)


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def work(
    study: StudyFolder, *, worker: int = 0, num_workers: int = 1, budget: Budget | None = None, show: bool = False
) -> bool:
    """Run what is left of a study and return when all of it is finished, by whomever.

    Args:
        study: the study; its folder may be shared with other processes.
        worker: with ``num_workers`` > 1, take only every ``num_workers``-th task, from ``worker`` on: for folders
            whose locks do not reach from machine to machine. Tasks that need nothing fall to worker 0.
        num_workers: how many such processes there are.
        budget: when to checkpoint and stop.
        show: report progress.

    Returns:
        True if the study is finished, False if the time budget ended it.
    """
    budget = budget or Budget()
    tasks = study_tasks(study)
    forget_lost(study, tasks)
    mine = [task for place, task in enumerate(tasks) if (place % num_workers if task.needs else 0) == worker]
    with budget.held():
        while left := [task for task in mine if study.result(task.name) is None]:
            ready = [task for task in left if all(study.result(name) is not None for name in task.needs)]
            if not any(_try(study, task, show) for task in ready):
                time.sleep(_WAIT_S)
        while any(study.result(task.name) is None for task in tasks):
            time.sleep(_WAIT_S)
    return all(study.result(task.name) is not None for task in tasks)


def run_study(study: StudyFolder, workers: Workers, *, budget: Budget | None = None, show: bool = False) -> bool:
    """Run what is left of a study in processes of this machine or on a Ray cluster.

    A task that is run again goes on from its last checkpoint. Other processes may work on the same folder at the same
    time: a task that one of them holds is waited for.

    Args:
        study: the study; on a cluster its folder has to be the same path on every machine.
        workers: where the tasks run.
        budget: when to checkpoint and stop.
        show: show progress, with a line for each process.

    Returns:
        True if the study is finished, False if the time budget ended it.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
        StorageError: a machine of the cluster does not see the folder.
        WorkerLost: a process was killed.
        PumaError: the reason for which a task was refused; the others are stopped, what was finished is kept.
    """
    tasks, lines = study_tasks(study), dict[int, str]()
    forget_lost(study, tasks)
    left = [task.name for task in tasks if study.result(task.name) is None]
    status, finished = StudyStatus(study, max(1, workers.count)), True
    with Progress(f"study {study.spec.name}", status.total, "%", show=show, done=status.done()) as bar:

        def refresh(number: int, line: str) -> None:
            lines[number] = line
            bar.update(status.done(), status.summary(), list(lines.values()))

        local = workers.ray is None
        until = None if budget is None else budget.until
        run = partial(_run_named, str(study.path.absolute()), until, local)
        where = replace(workers, on_line=refresh) if local else workers
        for _, done in run_tasks(run, left, where, needs={task.name: task.needs for task in tasks}):
            finished &= done
            bar.update(status.done(), status.summary())
    return finished


def _run_named(folder: str, until: float | None, show: bool, name: str) -> bool:
    """Run one task of the study in ``folder``; False if it is not finished, for want of time."""
    require_shared(Path(folder) / "study.toml", folder)
    study, budget = StudyFolder.open(folder), Budget(until)
    task = next(task for task in study_tasks(study) if task.name == name)
    if budget.spent or any(study.result(need) is None for need in task.needs):
        return False
    with budget.held():
        while study.result(name) is None and not _try(study, task, show):
            time.sleep(_WAIT_S)
    return study.result(name) is not None


def forget_lost(study: StudyFolder, tasks: list[Task]) -> None:
    """Forget finished tasks whose files are gone, where a task that is left needs them.

    So a study goes on elsewhere from its small files alone, and no result is computed again.
    """
    by_name = {task.name: task for task in tasks}
    for task in reversed(tasks):  # a task comes after those it needs
        if study.result(task.name) is None:
            for need in (by_name[name] for name in task.needs):
                if need.leaves is not None and not need.leaves.exists():
                    study.forget(need.name)


def run_task(study: StudyFolder, task: Task, show: bool) -> dict[str, Any]:
    """Run one task now and record its result, where it ran and by which code.

    Raises:
        ResumeError: a recipe of the study has changed since it began; files can be edited at any time.
    """
    study.freeze_recipes()
    started = time.monotonic()
    result = task.work(show)
    seconds = time.monotonic() - started
    where = {"host": socket.gethostname(), "threads": torch.get_num_threads()}
    code = {"torch": torch.__version__, "numpy": np.__version__, "puma": __version__, "commit": commit()}
    before = set(eps_warnings(study))
    study.finish(task.name, {**result, "seconds": seconds, **where, **code})
    for warning in eps_warnings(study):
        if warning not in before:  # as soon as the first runs show it
            logger.warning("%s: %s", study.spec.name, warning)
    return result


@cache
def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the checkout that a package runs from, with ``-dirty`` if files differ from it; None elsewhere."""
    checkout = package.parents[1]
    if package.parent.name != "src" or not (checkout / ".git").exists():
        return None  # installed; a repository that only holds the environment is not ours
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or it does not trust the folder: not worth a study
    return described.stdout.strip() or None


def _try(study: StudyFolder, task: Task, show: bool) -> bool:
    """Run a task unless another process holds it; True if it is finished now."""
    try:
        with lock(study.path / "done", f".{task.name}.lock"):
            if study.result(task.name) is None:
                run_task(study, task, show)
        return True
    except BusyError:
        return False

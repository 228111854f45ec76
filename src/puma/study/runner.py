"""Work through a study's tasks: in one process, in several, or on Ray; any number of processes may share a folder."""

from __future__ import annotations

import socket
import subprocess
import time
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
from puma.study.budget import Budget
from puma.study.folder import StudyFolder
from puma.study.status import StudyStatus
from puma.study.tasks import Task, study_tasks
from puma.tasks import Workers, require_shared, run_tasks

_WAIT_S = 0.5


def work(
    study: StudyFolder, *, worker: int = 0, num_workers: int = 1, budget: Budget | None = None, show: bool = False
) -> bool:
    """Run what is left of a study and return when all of it is finished, by whomever.

    Each task is held by a lock while it runs. A process that dies in any way loses its lock with its life, and its task
    is taken over from where its last checkpoint is.

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
    """Have finished tasks done again whose files are gone, where a task that is left needs them.

    So a study goes on elsewhere from its small files alone: what it found out is not repeated.
    """
    by_name = {task.name: task for task in tasks}
    for task in reversed(tasks):  # a task comes after what it needs, so what is forgotten here is seen further on
        if study.result(task.name) is None:
            for need in (by_name[name] for name in task.needs):
                if need.leaves is not None and not need.leaves.exists():
                    study.forget(need.name)


def run_task(study: StudyFolder, task: Task, show: bool) -> dict[str, Any]:
    """Run one task now and record what it gave, where and by which code.

    Raises:
        ResumeError: a recipe of the study has changed since it began; a file can be edited at any time.
    """
    study.freeze_recipes()
    started = time.monotonic()
    result = task.work(show)
    seconds = time.monotonic() - started
    where = {"host": socket.gethostname(), "threads": torch.get_num_threads()}
    code = {"torch": torch.__version__, "numpy": np.__version__, "puma": __version__, "commit": commit()}
    study.finish(task.name, {**result, "seconds": seconds, **where, **code})
    return result


@cache
def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the checkout that a package runs from, with ``-dirty`` if files differ from it; None elsewhere."""
    checkout = package.parents[1]
    if package.parent.name != "src" or not (checkout / ".git").exists():
        return None  # installed; a repository that only holds the environment is not ours
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        told = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or it does not trust the folder: not worth a study
    return told.stdout.strip() or None


def _try(study: StudyFolder, task: Task, show: bool) -> bool:
    """Run a task unless another process holds it; True if it is finished now."""
    try:
        with lock(study.path / "done", f".{task.name}.lock"):
            if study.result(task.name) is None:
                run_task(study, task, show)
        return True
    except BusyError:
        return False

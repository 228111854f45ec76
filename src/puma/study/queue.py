"""Work through a study's tasks; any number of processes may share one folder."""

from __future__ import annotations

import socket
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puma._version import __version__
from puma.errors import BusyError
from puma.io import lock
from puma.study.budget import Budget
from puma.study.folder import StudyFolder
from puma.study.tasks import Task, study_tasks

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


def run_when_free(study: StudyFolder, task: Task) -> None:
    """Run a task, or wait until the process that holds it has finished it."""
    while study.result(task.name) is None and not _try(study, task, show=False):
        time.sleep(_WAIT_S)


def _try(study: StudyFolder, task: Task, show: bool) -> bool:
    """Run a task unless another process holds it; True if it is finished now."""
    try:
        with lock(study.path / "done", f".{task.name}.lock"):
            if study.result(task.name) is None:
                run_task(study, task, show)
        return True
    except BusyError:
        return False

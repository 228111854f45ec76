"""Working through the tasks of a study: in one process, in several, or on Ray; and how far it is.

Any number of processes may share a study's folder: a task is held by a lock while it runs, and goes on from its last
checkpoint in another process if this one dies.
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
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from puma import __version__
from puma.errors import BusyError
from puma.io import lock, locked
from puma.progress import Progress
from puma.study.folder import StudyFolder
from puma.study.spec import RunSpec
from puma.study.stages import Task, study_tasks
from puma.tasks import Workers, end_once, require_shared, run_tasks

logger = logging.getLogger("puma")
_WAIT_S = 0.5
_ATTACKS = {  # the first that all of some runs have is compared
    "robust_accuracy": "robust accuracy",
    "apgd_accuracy": "accuracy under APGD-CE",
    "pgd_accuracy": "accuracy under the screen",
}


@contextmanager
def time_limit(seconds: float | None) -> Iterator[threading.Event]:
    """Stop the work inside after so many seconds, by SIGTERM, at which it keeps what it has finished; None: never.

    For the main thread only. The event that is yielded is set where the time was over.
    """
    over = threading.Event()

    def stop() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(seconds or 0, stop)
    before = signal.signal(signal.SIGTERM, end_once)
    if seconds is not None:
        timer.start()
    try:
        yield over
    except SystemExit:
        if not over.is_set():  # somebody else's SIGTERM
            raise
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def work(study: StudyFolder, *, worker: int = 0, num_workers: int = 1, show: bool = False) -> None:
    """Run what is left of a study in this process until all of it is finished, by whomever.

    With ``num_workers`` > 1 this is worker ``worker`` of so many, which takes only every ``num_workers``-th task: for
    shared folders whose locks do not reach from machine to machine.
    """
    tasks = study_tasks(study)
    forget_lost(study, tasks)
    mine = [task for place, task in enumerate(tasks) if (place % num_workers if task.needs else 0) == worker]
    while left := [task for task in mine if study.result(task.name) is None]:
        ready = [task for task in left if all(study.result(name) is not None for name in task.needs)]
        if not any(_try(study, task, show) for task in ready):
            time.sleep(_WAIT_S)
    while any(study.result(task.name) is None for task in tasks):
        time.sleep(_WAIT_S)


def run_study(study: StudyFolder, workers: Workers, *, show: bool = False) -> None:
    """Run what is left of a study in processes of this machine or on a Ray cluster.

    A task that is run again goes on from its last checkpoint; one that another process holds is waited for. On a
    cluster the folder has to be the same path on every machine (or `StorageError`).
    """
    tasks, lines = study_tasks(study), dict[int, str]()
    forget_lost(study, tasks)
    left = [task.name for task in tasks if study.result(task.name) is None]
    status = StudyStatus(study, max(1, workers.count))
    with Progress(f"study {study.spec.name}", 100, "%", show=show, done=status.done()) as bar:

        def refresh(number: int, line: str) -> None:
            lines[number] = line
            bar.update(status.done(), status.summary(), list(lines.values()))

        run = partial(_run_named, str(study.path.absolute()), workers.ray is None)
        where = replace(workers, on_line=refresh) if workers.ray is None else workers
        for _ in run_tasks(run, left, where, needs={task.name: task.needs for task in tasks}):
            bar.update(status.done(), status.summary())


def _run_named(folder: str, show: bool, name: str) -> None:
    """Run one task of the study in ``folder``, or wait for the process that does."""
    require_shared(Path(folder) / "study.toml", folder)
    study = StudyFolder.open(folder)
    task = next(task for task in study_tasks(study) if task.name == name)
    while study.result(name) is None and not _try(study, task, show):
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


def forget_lost(study: StudyFolder, tasks: list[Task]) -> None:
    """Forget finished tasks whose files are gone, where a task that is left needs them: the small files are enough."""
    by_name = {task.name: task for task in tasks}
    for task in reversed(tasks):  # a task comes after those it needs
        if study.result(task.name) is None:
            for need in (by_name[name] for name in task.needs):
                if need.leaves is not None and not need.leaves.exists():
                    (study.path / "done" / f"{need.name}.json").unlink(missing_ok=True)


def run_task(study: StudyFolder, task: Task, show: bool) -> dict[str, Any]:
    """Run one task now and record its result, where it ran and by which code; `ResumeError` if a recipe was edited."""
    study.freeze_recipes()
    started = time.monotonic()
    result = task.work(show)
    where = {"seconds": time.monotonic() - started, "host": socket.gethostname(), "threads": torch.get_num_threads()}
    code = {"torch": torch.__version__, "numpy": np.__version__, "puma": __version__, "commit": commit()}
    before = set(eps_warnings(study))
    study.finish(task.name, {**result, **where, **code})
    for warning in sorted(set(eps_warnings(study)) - before):  # as soon as the first runs show it
        logger.warning("%s: %s", study.spec.name, warning)
    return result


@cache
def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the checkout that a package runs from, with ``-dirty`` if files differ from it; None elsewhere."""
    if package.parent.name != "src" or not (package.parents[1] / ".git").exists():
        return None  # installed; a repository that only holds the environment is not ours
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    options: dict[str, Any] = {"cwd": package.parents[1], "capture_output": True, "text": True, "timeout": 10}
    try:
        described = subprocess.run(command, **options, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or it does not trust the folder: not worth a study
    return described.stdout.strip() or None


# --- how far a study is --------------------------------------------------------------------------------------------


class StudyStatus:
    """Counts a study's finished work in percent and estimates the time left with ``jobs`` processes."""

    def __init__(self, study: StudyFolder, jobs: int = 1) -> None:
        self.study, self.jobs, self.tasks = study, jobs, study_tasks(study)
        self._seen: dict[str, dict[str, Any]] = {}

    def finished(self) -> dict[str, dict[str, Any]]:
        """Results of the finished tasks by name."""
        for task in self.tasks:
            if task.name not in self._seen and (result := self.study.result(task.name)) is not None:
                self._seen[task.name] = result
        return self._seen

    def done(self) -> int:
        """Percent of the work that are finished."""
        finished = self.finished()
        weights = sum(task.weight for task in self.tasks if task.name in finished)
        return int(100 * weights / sum(task.weight for task in self.tasks))

    def eta(self) -> float | None:
        """Seconds left with ``jobs`` processes, at the mean pace so far; None before the first task."""
        finished, weights = self.finished(), {task.name: task.weight for task in self.tasks}
        known = [name for name in finished if finished[name].get("seconds", 0) > 0.01]
        if not known:
            return None
        pace = sum(finished[name]["seconds"] for name in known) / sum(weights[name] for name in known)
        return float(pace * sum(weight for name, weight in weights.items() if name not in finished) / self.jobs)

    def summary(self) -> str:
        """Finished tasks and time left, in a few words."""
        eta = self.eta()
        left = "after the first task" if eta is None else timedelta(seconds=round(eta))
        return f"{len(self.finished())} of {len(self.tasks)} tasks, ETA {left}"


def grid(study: StudyFolder) -> dict[str, dict[int | None, str]]:
    """Shared tasks, then each strategy, prune fraction, pool and recipe: states by seed (None of a shared task).

    A state is ``finished``, ``evaluating`` (trained), ``running`` or ``waiting``.
    """
    finished, states = StudyStatus(study).finished(), dict[str, str]()
    for task in study_tasks(study):
        held = task.name not in finished and locked(study.path / "done", f".{task.name}.lock")
        states[task.name] = "finished" if task.name in finished else "running" if held else "waiting"
    of_runs, settings = set[str](), dict[RunSpec, dict[int | None, str]]()
    for run in study.spec.runs():
        names = [f"{prefix}{run.key}" for prefix in ("", "attack-", "mislabelled-")]
        own = [states[name] for name in names if name in states]
        of_runs |= set(names)
        seeds = settings.setdefault(replace(run, seed=0), {})
        seeds[run.seed] = "evaluating" if own[0] == "finished" and set(own) != {"finished"} else own[0]
    lines: dict[str, dict[int | None, str]]
    lines = {name: {None: state} for name, state in states.items() if name not in of_runs}
    several_recipes = len({run.recipe for run in settings}) > 1
    for first, seeds in settings.items():
        label = [first.label]
        label += [f"prune {first.prune_fraction:g}"] if first.prune_fraction else []
        label += [] if first.synthetic is None else [f"{first.synthetic:,} synthetic"]
        label += [Path(first.recipe).stem] if several_recipes else []
        lines[", ".join(label)] = seeds
    return lines


def eps_warnings(study: StudyFolder) -> list[str]:
    """Pools in which a smaller uniform eps beats full eps in both accuracies: eps is then too large for the labels."""
    kinds, warnings = ("none", "uniform-eps"), []
    rows = {run: study.row(run) for run in study.spec.runs() if run.strategy in kinds and study.result(run.key)}
    pairs: dict[RunSpec, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for run, row in rows.items():
        if (full := rows.get(replace(run, strategy="none", params=()))) is not None and run.strategy != "none":
            pairs.setdefault(replace(run, seed=0), []).append((full, row))
    for run, both in pairs.items():
        known = [name for name in _ATTACKS if all(row.get(name) is not None for pair in both for row in pair)]
        if not known or (scale := dict(run.params).get("scale", 0.5)) >= 1:
            continue
        clean, robust = (fmean(row[name] - full[name] for full, row in both) for name in ("clean_accuracy", known[0]))
        if clean > 0 and robust > 0:
            warnings.append(
                f"eps is too large for these labels to say anything about PUMA: {scale:g} eps on all data is better "
                f"than full eps in clean ({clean:+.1%}) and in {_ATTACKS[known[0]]} ({robust:+.1%}); "
                "choose a smaller eps"
            )
    return warnings

"""Working through the tasks of a study: in one process, in several, or on Ray; and how far it is.

Any number of processes may share a study's folder: a task is held by a lock while it runs, and goes on from its last
checkpoint in another process if this one dies.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puma import __version__
from puma.errors import BusyError
from puma.io import lock, lock_holder
from puma.progress import Progress
from puma.study.folder import StudyFolder
from puma.study.spec import RunSpec
from puma.study.stages import Task, study_tasks
from puma.tasks import Workers, require_shared, run_tasks

logger = logging.getLogger("puma")
_WAIT_S = 0.5


class Budget:
    """Time until which work may go on, in seconds since the epoch, a clock that all machines share; None for ever."""

    def __init__(self, until: float | None = None) -> None:
        self.until = until
        self._stopped = False

    @classmethod
    def of(cls, seconds: float | None) -> Budget:
        """So many seconds from now; None for no end."""
        return cls(None if seconds is None else time.time() + seconds)

    @property
    def spent(self) -> bool:
        """Whether the time is over."""
        return self._stopped or (self.until is not None and time.time() >= self.until)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop the work inside when the time is over, and go on behind it; for the main thread only.

        All engines keep what they have finished at SIGTERM and end with SystemExit.
        """
        if self.until is None:
            yield
            return

        def terminated(number: int, frame: object) -> None:
            raise SystemExit(128 + number)

        def stop() -> None:
            self._stopped = True
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, terminated)
        timer = threading.Timer(max(self.until - time.time(), 0), stop)
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


def work(
    study: StudyFolder, *, worker: int = 0, num_workers: int = 1, budget: Budget | None = None, show: bool = False
) -> bool:
    """Run what is left of a study in this process until all of it is finished, by whomever; False if time ran out.

    With ``num_workers`` > 1 this is worker ``worker`` of so many, which takes only every ``num_workers``-th task: for
    shared folders whose locks do not reach from machine to machine.
    """
    tasks = study_tasks(study)
    forget_lost(study, tasks)
    mine = [task for place, task in enumerate(tasks) if (place % num_workers if task.needs else 0) == worker]
    with (budget or Budget()).held():
        while left := [task for task in mine if study.result(task.name) is None]:
            ready = [task for task in left if all(study.result(name) is not None for name in task.needs)]
            if not any(_try(study, task, show) for task in ready):
                time.sleep(_WAIT_S)
        while any(study.result(task.name) is None for task in tasks):
            time.sleep(_WAIT_S)
    return all(study.result(task.name) is not None for task in tasks)


def run_study(study: StudyFolder, workers: Workers, *, budget: Budget | None = None, show: bool = False) -> bool:
    """Run what is left of a study in processes of this machine or on a Ray cluster; False if time ran out.

    A task that is run again goes on from its last checkpoint; one that another process holds is waited for. On a
    cluster the folder has to be the same path on every machine (or `StorageError`).
    """
    tasks, lines = study_tasks(study), dict[int, str]()
    forget_lost(study, tasks)
    left = [task.name for task in tasks if study.result(task.name) is None]
    status, finished = StudyStatus(study, max(1, workers.count)), True
    with Progress(f"study {study.spec.name}", status.total, "%", show=show, done=status.done()) as bar:

        def refresh(number: int, line: str) -> None:
            lines[number] = line
            bar.update(status.done(), status.summary(), list(lines.values()))

        run = partial(_run_named, str(study.path.absolute()), budget.until if budget else None, workers.ray is None)
        where = replace(workers, on_line=refresh) if workers.ray is None else workers
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
                    study.forget(need.name)


def run_task(study: StudyFolder, task: Task, show: bool) -> dict[str, Any]:
    """Run one task now and record its result, where it ran and by which code; `ResumeError` if a recipe was edited."""
    study.freeze_recipes()
    started = time.monotonic()
    result = task.work(show)
    where = {"seconds": time.monotonic() - started, "host": socket.gethostname(), "threads": torch.get_num_threads()}
    code = {"torch": torch.__version__, "numpy": np.__version__, "puma": __version__, "commit": commit()}
    before = set(eps_warnings(study))
    study.finish(task.name, {**result, **where, **code})
    for warning in eps_warnings(study):
        if warning not in before:  # as soon as the first runs show it
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

    total = 100

    def __init__(self, study: StudyFolder, jobs: int = 1) -> None:
        self.study, self.jobs, self.tasks = study, jobs, study_tasks(study)
        self._seen: dict[str, dict[str, Any]] = {}
        self._changed = time.monotonic()

    def finished(self) -> dict[str, dict[str, Any]]:
        """Results of the finished tasks by name."""
        for task in self.tasks:
            if task.name not in self._seen and (result := self.study.result(task.name)) is not None:
                self._seen[task.name] = result
                self._changed = time.monotonic()
        return self._seen

    def done(self) -> int:
        """Percent of the work that are finished."""
        finished = self.finished()
        weights = sum(task.weight for task in self.tasks if task.name in finished)
        return int(self.total * weights / sum(task.weight for task in self.tasks))

    def eta(self) -> float | None:
        """Seconds left with ``jobs`` processes, from the median pace so far; None before the first task."""
        finished = self.finished()
        known = [task for task in self.tasks if finished.get(task.name, {}).get("seconds", 0) > 0.01]
        paces = sorted((finished[task.name]["seconds"] / task.weight, task.weight) for task in known)
        if not paces:
            return None
        reached = list(itertools.accumulate(weight for _, weight in paces))
        pace = next(pace for (pace, _), weight in zip(paces, reached, strict=True) if weight >= reached[-1] / 2)
        left = pace * sum(task.weight for task in self.tasks if task.name not in finished) / self.jobs
        return float(max(left / 10, left - (time.monotonic() - self._changed)))

    def summary(self) -> str:
        """Finished tasks and time left, in a few words."""
        eta, left = self.eta(), "ETA after the first task"
        if eta is not None:
            left = "ETA " + (
                f"{eta / 3600:.1f} h" if eta > 5400 else f"{eta / 60:.0f} min" if eta > 90 else f"{eta:.0f} s"
            )
        return f"{len(self.finished())} of {len(self.tasks)} tasks, {left}"


@dataclass(frozen=True)
class Line:
    """One line of a study's grid: a task that runs share, or a strategy with mean accuracies over its finished seeds.

    ``states``: seed (None for a shared task) -> ``finished``, ``evaluating`` (trained), ``running`` or ``waiting``.
    """

    label: str
    states: Mapping[int | None, str]
    clean: float | None = None
    robust: float | None = None


def grid(study: StudyFolder) -> list[Line]:
    """The grid of a study: shared tasks first, then one line per strategy, prune fraction, pool and recipe."""
    finished = StudyStatus(study).finished()

    def state(task: str) -> str:
        if task in finished:
            return "finished"
        return "running" if lock_holder(study.path / "done", f".{task}.lock") is not None else "waiting"

    states = {task.name: state(task.name) for task in study_tasks(study)}
    of_runs, settings = set[str](), dict[RunSpec, dict[int | None, str]]()
    for run in study.spec.runs():
        names = [f"{prefix}{run.key}" for prefix in ("", "attack-", "mislabelled-")]
        own = [states[name] for name in names if name in states]
        of_runs |= set(names)
        seeds = settings.setdefault(replace(run, seed=0), {})
        seeds[run.seed] = "evaluating" if own[0] == "finished" and set(own) != {"finished"} else own[0]
    lines = [Line(name, {None: state}) for name, state in states.items() if name not in of_runs]
    several_recipes = len({run.recipe for run in settings}) > 1
    for first, seeds in settings.items():
        label = [first.label]
        label += [f"prune {first.prune_fraction:g}"] if first.prune_fraction else []
        label += [] if first.synthetic is None else [f"{first.synthetic:,} synthetic"]
        label += [Path(first.recipe).stem] if several_recipes else []
        runs = [replace(first, seed=seed) for seed in seeds if seed is not None]
        rows = [study.row(run) for run in runs if run.key in finished]
        clean, robust = _mean([row["clean_accuracy"] for row in rows]), _mean(strongest(rows))
        lines.append(Line(", ".join(label), seeds, clean, robust))
    return lines


def strongest(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Accuracy of each row under the strongest attack that all of them have; empty where there is none."""
    for name in ("robust_accuracy", "apgd_accuracy", "pgd_accuracy"):
        if all(row.get(name) is not None for row in rows):
            return [float(row[name]) for row in rows]
    return []


def eps_warnings(study: StudyFolder) -> list[str]:
    """Pools in which a smaller uniform eps beats full eps in both accuracies: eps is then too large for the labels."""
    warnings = []
    finished = [run for run in study.spec.runs() if study.result(run.key) is not None]
    full = {(run.synthetic, run.recipe, run.seed): run for run in finished if run.strategy == "none"}
    smaller: dict[tuple[Any, ...], list[tuple[RunSpec, RunSpec]]] = {}
    for run in (run for run in finished if run.strategy == "uniform-eps"):
        scale, twin = dict(run.params).get("scale", 0.5), full.get((run.synthetic, run.recipe, run.seed))
        if scale < 1 and twin is not None:
            smaller.setdefault((run.synthetic, run.recipe, scale), []).append((twin, run))
    for (_, _, scale), pairs in smaller.items():
        rows = [study.row(run) for pair in pairs for run in pair]
        accuracies = [float(row["clean_accuracy"]) for row in rows], strongest(rows)
        clean, robust = (
            _mean([own - none for none, own in zip(a[::2], a[1::2], strict=True)]) or 0 for a in accuracies
        )
        if clean > 0 and robust > 0:
            warnings.append(
                f"eps is too large for these labels to say anything about PUMA: {scale:g} eps on all data is better "
                f"than full eps in clean ({clean:+.1%}) and in robust accuracy ({robust:+.1%}); choose a smaller eps"
            )
    return warnings


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

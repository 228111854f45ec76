"""Progress of a study: counts and time left, its grid run by run, and whether its eps is too large to say anything."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from puma.io import lock_holder
from puma.study.folder import StudyFolder
from puma.study.spec import RunSpec
from puma.study.tasks import study_tasks


class StudyStatus:
    """Counts a study's finished work in percent and estimates the time left.

    Args:
        study: the study.
        jobs: how many processes work on it.
    """

    total = 100

    def __init__(self, study: StudyFolder, jobs: int = 1) -> None:
        self.study, self.jobs = study, jobs
        self.tasks = study_tasks(study)
        self._weights = sum(task.weight for task in self.tasks)
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
        return int(self.total * sum(task.weight for task in self.tasks if task.name in finished) / self._weights)

    def eta(self) -> float | None:
        """Seconds left with ``jobs`` processes, from the tasks finished so far; None before the first.

        The pace is the median over units of work, so that one interrupted task does not distort it. The tasks that run
        now are taken to need a tenth of their time at least: while something is left, that is never 0.
        """
        finished = self.finished()
        known = [task for task in self.tasks if finished.get(task.name, {}).get("seconds", 0) > 0.01]
        paces = sorted((finished[task.name]["seconds"] / task.weight, task.weight) for task in known)
        if not paces:
            return None
        half = sum(weight for _, weight in paces) / 2
        reached = itertools.accumulate(weight for _, weight in paces)
        pace = next(pace for (pace, _), weight in zip(paces, reached, strict=True) if weight >= half)
        left = pace * sum(task.weight for task in self.tasks if task.name not in finished) / self.jobs
        return float(max(left / 10, left - (time.monotonic() - self._changed)))

    def summary(self) -> str:
        """Finished tasks and time left, in a few words."""
        eta = self.eta()
        left = "ETA after the first task"
        if eta is not None:
            left = (
                f"ETA {eta / 3600:.1f} h"
                if eta > 5400
                else f"ETA {eta / 60:.0f} min"
                if eta > 90
                else f"ETA {eta:.0f} s"
            )
        return f"{len(self.finished())} of {len(self.tasks)} tasks, {left}"


@dataclass(frozen=True)
class Line:
    """One line of a study's grid: a task that runs share, or a strategy over its seeds.

    Args:
        label: what it is.
        states: seed -> ``finished``, ``evaluating`` (trained, attacks left), ``running`` or ``waiting``; a shared task
            has the one seed None.
        clean: mean clean accuracy over the finished seeds, None before the first.
        robust: mean accuracy under the strongest attack that has been run (AutoAttack standard, APGD, CE + CW PGD).
    """

    label: str
    states: Mapping[int | None, str]
    clean: float | None = None
    robust: float | None = None


def grid(study: StudyFolder) -> list[Line]:
    """The grid of a study: shared tasks first, then one line per strategy, prune fraction, pool and recipe."""
    finished = StudyStatus(study).finished()
    states = {task.name: _state(study, task.name, task.name in finished) for task in study_tasks(study)}
    runs = study.spec.runs()
    names = {run: [f"{prefix}{run.key}" for prefix in ("", "attack-", "mislabelled-")] for run in runs}
    of_runs = {name for group in names.values() for name in group}
    lines = [Line(name, {None: state}) for name, state in states.items() if name not in of_runs]
    recipes = {run.recipe for run in runs}
    settings: dict[RunSpec, list[RunSpec]] = {}
    for run in runs:
        settings.setdefault(replace(run, seed=0), []).append(run)
    for group in settings.values():
        seeds: dict[int | None, str] = {}
        for run in group:
            own = [states[name] for name in names[run] if name in states]
            evaluating = own[0] == "finished" and set(own) != {"finished"}
            seeds[run.seed] = "evaluating" if evaluating else own[0]
        rows = [result_row(study, run) for run in group if run.key in finished]
        robust = [strongest(row) for row in rows]
        lines.append(
            Line(_label(group[0], recipes), seeds, _mean([row["clean_accuracy"] for row in rows]), _mean(robust))
        )
    return lines


def result_row(study: StudyFolder, run: RunSpec, checkpoint: int = 0) -> dict[str, Any]:
    """The row of a finished run (its first checkpoint unless said otherwise), with its later attack if there is one."""
    row = (study.result(run.key) or {})["rows"][checkpoint]
    later = (study.result(f"attack-{run.key}") or {}).get("accuracies", [])
    return {**row, **next((found for found in later if found["checkpoint"] == row["checkpoint"]), {})}


def strongest(row: Mapping[str, Any]) -> float | None:
    """Accuracy under the strongest attack that a row has."""
    names = ("robust_accuracy", "apgd_accuracy", "pgd_accuracy")
    return next((row[name] for name in names if row.get(name) is not None), None)


def eps_warnings(study: StudyFolder) -> list[str]:
    """Pools in which a smaller uniform eps beats full eps in both accuracies: eps is then too large for the labels.

    Means over the seeds that both have finished, by pool and recipe.
    """
    warnings = []
    finished = [run for run in study.spec.runs() if study.result(run.key) is not None]
    full = {(run.synthetic, run.recipe, run.seed): run for run in finished if run.strategy == "none"}
    smaller: dict[tuple[Any, ...], list[tuple[RunSpec, RunSpec]]] = {}
    for run in finished:
        scale = dict(run.params).get("scale", 0.5)
        twin = full.get((run.synthetic, run.recipe, run.seed))
        if run.strategy == "uniform-eps" and scale < 1 and twin is not None:
            smaller.setdefault((run.synthetic, run.recipe, scale), []).append((twin, run))
    for (_, _, scale), pairs in smaller.items():
        rows = [[result_row(study, run) for run in pair] for pair in pairs]
        clean = _mean([own["clean_accuracy"] - none["clean_accuracy"] for none, own in rows])
        robust = _mean([(strongest(own) or 0) - (strongest(none) or 0) for none, own in rows])
        if clean is not None and robust is not None and clean > 0 and robust > 0:
            warnings.append(
                f"eps is too large for these labels to say anything about PUMA: {scale:g} eps on all data is better "
                f"than full eps in clean ({clean:+.1%}) and in robust accuracy ({robust:+.1%}); choose a smaller eps"
            )
    return warnings


def _label(run: RunSpec, recipes: Collection[str]) -> str:
    parts = [run.label]
    if run.prune_fraction:
        parts.append(f"prune {run.prune_fraction:g}")
    if run.synthetic is not None:
        parts.append(f"{run.synthetic:,} synthetic")
    if len(recipes) > 1:
        parts.append(Path(run.recipe).stem)
    return ", ".join(parts)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _state(study: StudyFolder, task: str, finished: bool) -> str:
    if finished:
        return "finished"
    return "running" if lock_holder(study.path / "done", f".{task}.lock") is not None else "waiting"

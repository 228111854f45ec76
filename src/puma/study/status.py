"""How far a study is: its grid, cell by cell, and an estimate of what is left."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from puma.io import lock_holder
from puma.study.folder import StudyFolder
from puma.study.spec import Cell
from puma.study.tasks import study_tasks


class StudyStatus:
    """Counts a study's finished work in hundredths and estimates the rest.

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
        """Hundredths of the work that are finished."""
        finished = self.finished()
        return int(self.total * sum(task.weight for task in self.tasks if task.name in finished) / self._weights)

    def eta(self) -> float | None:
        """Seconds left with ``jobs`` processes, from the tasks finished so far; None before the first.

        The pace is the median over units of work, so that a machine that slept through a task does not spoil it.
        """
        finished = self.finished()
        paces = sorted((finished[t.name]["seconds"] / t.weight, t.weight) for t in self.tasks if t.name in finished)
        done = sum(weight for _, weight in paces)
        if not paces:
            return None
        reached = itertools.accumulate(weight for _, weight in paces)
        pace = next(pace for (pace, _), weight in zip(paces, reached, strict=True) if weight >= done / 2)
        return max(0.0, float(pace) * (self._weights - done) / self.jobs - (time.monotonic() - self._changed))

    def summary(self) -> str:
        """Finished pieces and time left, in a few words."""
        eta = self.eta()
        left = (
            "ETA after the first piece"
            if eta is None
            else f"ETA {eta / 60:.0f} min"
            if eta > 90
            else f"ETA {eta:.0f} s"
        )
        return f"{len(self.finished())} of {len(self.tasks)} pieces, {left}"


@dataclass(frozen=True)
class Line:
    """One line of a study's grid: a piece that cells share, or a strategy over its seeds.

    Args:
        label: what it is.
        states: seed -> ``finished``, ``judging`` (trained and judged, its perturbations not yet), ``running`` or
            ``waiting``; a shared piece has the one seed None.
        clean: mean clean accuracy over the finished seeds, None before the first.
        robust: mean robust accuracy (AutoAttack standard, else APGD).
    """

    label: str
    states: Mapping[int | None, str]
    clean: float | None = None
    robust: float | None = None


def grid(study: StudyFolder) -> list[Line]:
    """The grid of a study: what cells share first, then one line per strategy, prune fraction, pool and recipe."""
    finished = StudyStatus(study).finished()
    states = {task.name: _state(study, task.name, task.name in finished) for task in study_tasks(study)}
    cells = study.spec.cells()
    of_cells = {f"{prefix}{cell.key}" for cell in cells for prefix in ("", "attack-", "mislabelled-")}
    lines = [Line(name, {None: state}) for name, state in states.items() if name not in of_cells]
    recipes = {cell.recipe for cell in cells}
    for label, group in itertools.groupby(sorted(cells, key=_place(cells)), key=lambda cell: _label(cell, recipes)):
        seeds = {cell.seed: cell for cell in group}
        rows = [finished[cell.key]["rows"][0] for cell in seeds.values() if cell.key in finished]
        of_seeds: dict[int | None, str] = {
            seed: _whole(states[cell.key], states.get(f"mislabelled-{cell.key}")) for seed, cell in seeds.items()
        }
        robust = [_first(row, "robust_accuracy", "apgd_accuracy", "pgd_accuracy") for row in rows]
        lines.append(Line(label, of_seeds, _mean([row["clean_accuracy"] for row in rows]), _mean(robust)))
    return lines


def _place(cells: Sequence[Cell]) -> Callable[[Cell], int]:
    """Where a cell's arm first appears in the study."""
    first: dict[Cell, int] = {}
    for place, cell in enumerate(cells):
        first.setdefault(replace(cell, seed=0), place)
    return lambda cell: first[replace(cell, seed=0)]


def _label(cell: Cell, recipes: Collection[str]) -> str:
    parts = [cell.label]
    if cell.prune_fraction:
        parts.append(f"prune {cell.prune_fraction:g}")
    if cell.synthetic is not None:
        parts.append(f"{cell.synthetic:,} synthetic")
    if len(recipes) > 1:
        parts.append(Path(cell.recipe).stem)
    return ", ".join(parts)


def _whole(cell: str, judgement: str | None) -> str:
    return "judging" if cell == "finished" and judgement not in (None, "finished") else cell


def _first(row: Mapping[str, Any], *names: str) -> float | None:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _state(study: StudyFolder, task: str, finished: bool) -> str:
    return "finished" if finished else "running" if _running(study, task) else "waiting"


def _running(study: StudyFolder, task: str) -> bool:
    """Whether a live process holds the task; looks only, so that a folder that cannot be written has a status too."""
    return lock_holder(study.path / "done", f".{task}.lock") is not None

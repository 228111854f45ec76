"""The pieces of a study and what each one waits for: images, margins, the judge, cells, judgements.

A task reads what earlier tasks left in the folder and leaves its own; any process that sees the folder can run it.
What it has finished before a stop is found again by the engines themselves, so running it again goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from puma.study.cells import judge_cell, run_cell
from puma.study.folder import StudyFolder
from puma.study.margins import score_pool, train_judge
from puma.study.materials import make_synthetic


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Args:
        name: unique in the study; also its file name.
        label: what a person reads while it runs.
        needs: names of tasks that have to be finished before.
        weight: rough share of the time, for the progress bar.
        work: does it; takes ``show`` (progress) and returns what is recorded.
    """

    name: str
    label: str
    needs: tuple[str, ...]
    weight: float
    work: Callable[[bool], dict[str, Any]]


def study_tasks(study: StudyFolder) -> list[Task]:
    """All tasks of a study, in the order in which they are best begun."""
    spec = study.spec
    tasks = [Task("synthetic", "synthetic images", (), 1.5, lambda show: make_synthetic(study, show))]
    sizes = dict.fromkeys([None, *(cell.synthetic for cell in spec.cells())])
    for size in sizes:
        name, label = _margins(size), "margins" if size is None else f"margins ({size} synthetic)"
        tasks.append(
            Task(name, label, ("synthetic",), 1.0, lambda show, size=size: score_pool(study, size, show))  # type: ignore[misc]
        )
    judged = spec.evaluation.mislabelled > 0
    if judged:
        tasks.append(Task("judge", "judge", ("synthetic",), 0.7, lambda show: train_judge(study, show)))
    for cell in spec.cells():
        work = lambda show, cell=cell: run_cell(study, cell, show)  # noqa: E731
        tasks.append(Task(cell.key, cell.label, (_margins(cell.synthetic),), 1.0, work))
        if judged:
            look = lambda show, cell=cell: judge_cell(study, cell, show)  # noqa: E731
            tasks.append(Task(f"judged-{cell.key}", f"judging {cell.label}", (cell.key, "judge"), 0.05, look))
    return tasks


def _margins(size: int | None) -> str:
    return "margins" if size is None else f"margins-n{size}"

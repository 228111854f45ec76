"""The tasks of a study and what each one needs: images, margins, the reference model, cells, attacks.

A task reads what earlier tasks left in the folder and leaves its own; any process that sees the folder can run it.
What it has finished before a stop is found again by the engines themselves, so running it again goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from puma.study.cells import attack_cell, mislabelled_of_cell, more_than_margins, run_cell
from puma.study.folder import StudyFolder
from puma.study.margins import score_pool, score_run_of, train_reference
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
        leaves: the file or folder that later tasks read; None where they read only what is recorded.
    """

    name: str
    label: str
    needs: tuple[str, ...]
    weight: float
    work: Callable[[bool], dict[str, Any]]
    leaves: Path | None = None


def study_tasks(study: StudyFolder) -> list[Task]:
    """All tasks of a study, in the order in which they are best begun."""
    cells, reference = study.spec.cells(), study.spec.evaluation.mislabelled > 0
    tasks = [Task("synthetic", "synthetic images", (), 1.0, partial(make_synthetic, study), _made(study))]
    for size in dict.fromkeys([None, *(cell.synthetic for cell in cells)]):
        label = "" if size is None else f" ({size} synthetic)"
        score, margins = partial(score_pool, study, size), study.margin_folder(size)
        tasks.append(Task(_named("margins", size), f"margins{label}", ("synthetic",), 1.0, score, margins))
        if any(cell.synthetic == size and more_than_margins(cell) for cell in cells):
            work = partial(score_run_of, study, size)
            needs, scores = (_named("margins", size),), study.scores_folder(size)
            tasks.append(Task(_named("scores", size), f"other scores{label}", needs, 0.3, work, scores))
    if reference:
        work = partial(train_reference, study)
        tasks.append(Task("reference", "reference model", ("synthetic",), 0.7, work, study.path / "reference"))
    attacked = set(study.spec.attacked_cells()) if study.spec.evaluation.screen else set()
    for cell in cells:
        needs = (_named("scores" if more_than_margins(cell) else "margins", cell.synthetic),)
        tasks.append(Task(cell.key, cell.label, needs, 1.0, partial(run_cell, study, cell), study.run_folder(cell)))
        if cell in attacked:
            work = partial(attack_cell, study, cell)
            tasks.append(Task(f"attack-{cell.key}", f"{cell.label}, attack", (cell.key,), 1.0, work))
        if reference:
            name, work = f"mislabelled-{cell.key}", partial(mislabelled_of_cell, study, cell)
            tasks.append(Task(name, f"{cell.label}, mislabelled", (cell.key, "reference"), 0.05, work))
    return tasks


def _made(study: StudyFolder) -> Path | None:
    """The images the study makes for itself, if it makes any."""
    return study.synthetic_file if isinstance(study.spec.pool.synthetic, int) else None


def _named(what: str, size: int | None) -> str:
    return what if size is None else f"{what}-n{size}"

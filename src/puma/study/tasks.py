"""The tasks of a study: what each one needs, does and leaves. Any process that sees the folder can run one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from puma.study import stages
from puma.study.folder import StudyFolder


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: unique in the study; also its file name in ``done/``.
        label: shown while it runs.
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
    spec, made = study.spec, study.synthetic_file if isinstance(study.spec.pool.synthetic, int) else None
    tasks = [Task("synthetic", "synthetic images", (), 1.0, partial(stages.make_synthetic, study), made)]
    for size in dict.fromkeys([None, *(run.synthetic for run in spec.runs())]):
        label, end = ("", "") if size is None else (f" ({size} synthetic)", f"-n{size}")
        work, folder = partial(stages.score_pool, study, size), study.pool_folder(size)
        tasks.append(Task(f"margins{end}", f"margins{label}", ("synthetic",), 1.0, work, folder / "margins"))
        if any(run.synthetic == size and run.needs_snapshots for run in spec.runs()):
            work, needs = partial(stages.score_snapshots, study, size), (f"margins{end}",)
            tasks.append(Task(f"scores{end}", f"other scores{label}", needs, 0.3, work, folder / "scores"))
    if spec.evaluation.mislabelled:
        work = partial(stages.train_reference, study)
        tasks.append(Task("reference", "reference model", ("synthetic",), 0.7, work, study.path / "reference"))
    attacked = set(spec.attacked_runs()) if spec.evaluation.screen else set()
    for run in spec.runs():
        end = "" if run.synthetic is None else f"-n{run.synthetic}"
        needs, work = (f"{'scores' if run.needs_snapshots else 'margins'}{end}",), partial(stages.run_one, study, run)
        tasks.append(Task(run.key, run.label, needs, 1.0, work, study.run_folder(run)))
        if run in attacked:
            work = partial(stages.attack_one, study, run)
            tasks.append(Task(f"attack-{run.key}", f"{run.label}, attack", (run.key,), 1.0, work))
        if spec.evaluation.mislabelled:
            work, label = partial(stages.mislabelled_of, study, run), f"{run.label}, mislabelled"
            tasks.append(Task(f"mislabelled-{run.key}", label, (run.key, "reference"), 0.05, work))
    return tasks

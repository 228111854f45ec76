"""How far a study is: its grid, cell by cell, and an estimate of what is left."""

from __future__ import annotations

import time
from typing import Any

from puma.errors import BusyError
from puma.files import lock
from puma.study.folder import StudyFolder
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
        """Seconds left with ``jobs`` processes, from the tasks finished so far; None before the first."""
        finished = self.finished()
        weight = sum(task.weight for task in self.tasks if task.name in finished)
        if not weight:
            return None
        pace = float(sum(result["seconds"] for result in finished.values())) / weight
        return max(0.0, pace * (self._weights - weight) / self.jobs - (time.monotonic() - self._changed))

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


def grid(study: StudyFolder) -> list[dict[str, Any]]:
    """One line per task: ``task, state {finished, running, waiting}, seconds, clean, robust``."""
    status, lines = StudyStatus(study), []
    finished = status.finished()
    for task in status.tasks:
        result = finished.get(task.name)
        last = (result or {}).get("rows", [{}])[0]
        lines.append(
            {
                "task": task.label,
                "cell": task.name,
                "state": "finished" if result else "running" if _running(study, task.name) else "waiting",
                "seconds": result["seconds"] if result else None,
                "clean": last.get("clean_accuracy"),
                "robust": last.get("robust_accuracy"),
            }
        )
    return lines


def _running(study: StudyFolder, task: str) -> bool:
    """Whether a live process holds the task."""
    path = study.path / "done" / f".{task}.lock"
    if not path.exists():
        return False
    try:
        with lock(path.parent, path.name):
            return False
    except BusyError:
        return True

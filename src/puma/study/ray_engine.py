"""A study on a cluster: each piece of work is one Ray task, in a folder that all machines share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from puma.cluster import Cluster, require_shared
from puma.progress import Progress
from puma.study.budget import Budget
from puma.study.folder import StudyFolder
from puma.study.queue import forget_lost, run_when_free
from puma.study.tasks import study_tasks

_RETRIES = 3


def run_on_ray(
    study: StudyFolder,
    *,
    address: str | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    budget: Budget | None = None,
    show: bool = False,
) -> bool:
    """Run what is left of a study as Ray tasks; Ray balances the load and runs a task again if its worker is lost.

    A task that is run again goes on from its last checkpoint. Other processes may work on the same folder at the same
    time: a piece that one of them holds is waited for.

    Args:
        study: the study; its folder has to be the same path on every machine.
        address: of the cluster, None starts Ray on this machine for the time.
        num_cpus: CPUs that each task takes; they are also its threads.
        num_gpus: GPUs that each task takes.
        budget: when to checkpoint and stop.
        show: report progress.

    Returns:
        True if the study is finished, False if the time budget ended it.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
        StorageError: a machine of the cluster does not see the folder.
        PumaError: what a piece of work was refused for.
    """
    cluster, budget = Cluster(address), budget or Budget()
    tasks = study_tasks(study)
    forget_lost(study, tasks)
    with cluster:
        hand_out = cluster.task(run_piece, cpus=num_cpus, gpus=num_gpus, retries=_RETRIES)
        references: dict[str, Any] = {}
        threads = max(1, int(num_cpus))
        left = [task for task in tasks if study.result(task.name) is None]
        for task in left:  # a task's needs come before it, and Ray holds it back until they are there
            needs = [references[name] for name in task.needs if name in references]
            references[task.name] = hand_out(str(study.path.absolute()), task.name, threads, budget.until, *needs)
        names = {reference: name for name, reference in references.items()}
        done = len(tasks) - len(left)
        with Progress(f"study {study.spec.name} on Ray", len(tasks), "pieces", show=show, done=done) as bar:
            finished = True
            for reference, whole in cluster.results(names):
                finished &= whole
                bar.advance(1, names[reference])
            return finished


def run_piece(folder: str, name: str, threads: int, until: float | None, *needs: bool) -> bool:
    """The task: run one piece of the study in ``folder``; False if it is not finished, for want of time."""
    torch.set_num_threads(threads)
    budget = Budget(until)
    if budget.spent or not all(needs):
        return False
    require_shared(Path(folder) / "study.toml", folder)
    study = StudyFolder.open(folder)
    task = next(task for task in study_tasks(study) if task.name == name)
    with budget.held():
        run_when_free(study, task)
    return study.result(name) is not None

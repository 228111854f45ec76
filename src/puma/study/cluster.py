"""A study on a cluster: each piece of work is one Ray task, in a folder that all machines share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puma.errors import UsageError
from puma.files import lock
from puma.progress import Progress
from puma.study.folder import StudyFolder
from puma.study.queue import forget_lost, run_task
from puma.study.tasks import study_tasks


def run_on_ray(
    study: StudyFolder, *, address: str | None, num_cpus: float, num_gpus: float, show: bool = False
) -> None:
    """Run what is left of a study as Ray tasks; Ray balances the load and runs a task again if its machine is lost.

    Args:
        study: the study; its folder has to be the same path on every machine.
        address: of the cluster, None starts Ray on this machine.
        num_cpus: CPUs of each task.
        num_gpus: GPUs of each task.
        show: report progress.

    Raises:
        UsageError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("Ray is not installed", fix="pip install 'puma-robust[ray]'") from None
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=3)(_run)
    references: dict[str, Any] = {}
    tasks = study_tasks(study)
    forget_lost(study, tasks)
    for task in tasks:  # a task's needs come before it, and Ray holds it back until they are there
        needs = [references[name] for name in task.needs]
        references[task.name] = remote.remote(str(study.path.resolve()), task.name, *needs)
    names = {reference: name for name, reference in references.items()}
    waiting = list(names)
    with Progress(f"study {study.spec.name} on Ray", len(waiting), "pieces", show=show) as bar:
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            for reference in ready:
                ray.get(reference)  # raises here what went wrong there
                bar.advance(1, names[reference])


def _run(folder: str, name: str, *needs: str) -> str:
    """Run one task of the study in ``folder``, unless it is finished."""
    study = StudyFolder.open(Path(folder))
    task = next(task for task in study_tasks(study) if task.name == name)
    with lock(study.path / "done", f".{name}.lock"):
        if study.result(name) is None:
            run_task(study, task, show=False)
    return name

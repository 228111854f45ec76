"""A Ray cluster: joined, or started on this machine for the time; tasks handed out and waited for.

Ray starts the tasks, runs those again whose worker died, and lets machines join or leave. Only this module talks to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from puma.errors import PumaError, StorageError, UsageError


class Cluster:
    """The cluster at an address, or one of this machine's own that ends with the work; a context manager.

    Args:
        address: of a running cluster (``"auto"``, ``"host:6379"``); None starts one here.

    Raises:
        UsageError: Ray is not installed, or (on entering) there is no cluster at the address.
    """

    def __init__(self, address: str | None) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("Ray is not installed", fix='pip install "puma-robust[ray]"') from None
        self._ray: Any = ray
        self._address = address
        self._ours = not ray.is_initialized()

    def __enter__(self) -> Cluster:
        if not self._ours:
            return self
        paths = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
        try:
            self._ray.init(
                address=self._address,
                log_to_driver=False,
                include_dashboard=False if self._address is None else None,
                runtime_env={"env_vars": {"PYTHONPATH": paths}},
            )
        except (ConnectionError, ValueError) as error:
            raise UsageError(
                f"no Ray cluster at {self._address!r}",
                why=str(error).splitlines()[0],
                fix="`ray start --head` starts one",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._ray.shutdown()

    def task(self, function: Callable[..., Any], *, cpus: float, gpus: float, retries: int) -> Callable[..., Any]:
        """``function`` as a task: calling it hands it out and returns a reference to its result.

        Args:
            function: can be imported on every machine; a reference among its arguments is waited for.
            cpus: CPUs that each task takes.
            gpus: GPUs that each task takes.
            retries: how often it is run again when its worker is lost.
        """
        remote = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(function)
        hand_out: Callable[..., Any] = remote.remote
        return hand_out

    def results(self, references: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield each reference with its result, as they come; the first that fails calls off the others.

        Raises:
            PumaError: the task's own error: a user's mistake keeps its text and exit code.
        """
        waiting = list(references)
        while waiting:
            (reference,), waiting = self._ray.wait(waiting, num_returns=1)
            try:
                result = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                for other in waiting:
                    self._ray.cancel(other)
                raise (error.cause if isinstance(error.cause, PumaError) else error) from error
            yield reference, result


def require_shared(mark: Path, folder: Path | str) -> None:
    """Refuse a machine that does not see the ``mark`` which was left in ``folder`` where the work was started.

    Raises:
        StorageError: the folder is not shared.
    """
    if not mark.exists():
        raise StorageError(
            f"{folder} on {os.uname().nodename} is not the folder where the work was started",
            why="the workers of a cluster write into one common folder",
            fix="choose --out on storage that every machine mounts at the same path",
        )
